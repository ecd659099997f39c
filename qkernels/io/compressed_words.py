"""The int32 words of compressed-tensors' pack-quantized weights, as canonical codes.

Codes lie along a row, low bits first, in one of two layouts that bear the same name in a checkpoint:

    dense   (since 0.18.0)   one stream of bits: a code may begin in one word and end in the next; little-endian words of it are canonical
    padded  (to 0.17.1)      32 // bits whole codes a word, its other bits zero; of 1, 2, 4 and 8 bits the two are the same
"""

from __future__ import annotations

import re

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.formats.packing import pack, unpack

DENSE_SINCE, PADDED_UNTIL = (0, 18, 0), (0, 17, 1)


def width(count: int, bits: int, padded: bool) -> int:
    """Words of a row of `count` codes."""
    return -(-count // (32 // bits)) if padded else -(-count * bits // 32)


def differ(bits: int, *counts: int) -> bool:
    """Whether rows of so many codes lie otherwise in the two layouts."""
    return 32 % bits > 0 and any(count > 32 // bits for count in counts)


def is_padded(name: str, bits: int, version: str | None, *rows: tuple[int, int]) -> bool:
    """Which of the layouts rows of (codes, words) have: that of fitting width; where both fit, the one of the version that wrote them.

    Raises CheckpointError where neither fits, or both do and the version does not tell.
    """
    fitting = [padded for padded in (False, True) if all(words == width(count, bits, padded) for count, words in rows)]
    if not fitting:
        stated = ", ".join(f"{words} words for {count} codes" for count, words in rows)
        needed = " or ".join(str([width(count, bits, padded) for count, _ in rows]) for padded in (False, True))
        raise CheckpointError(f"{name} has {stated} of {bits} bits; {needed} are needed: weight_shape or num_bits is wrong")
    if len(fitting) == 1:
        return fitting[0]
    if not differ(bits, *(count for count, _ in rows)):
        return False
    padded = padded_by(version)
    if padded is None:
        raise CheckpointError(
            f"{name}: {rows[0][0]} codes of {bits} bits take as many words in compressed-tensors to 0.17.1 as since 0.18.0, "
            f"and lie otherwise: set quantization_config: version, which is {version!r}, to what wrote them"
        )
    return padded


def padded_by(version: str | None) -> bool | None:
    """Whether a version of compressed-tensors wrote padded words; None where that is not known (versions between the releases)."""
    parts = re.match(r"(\d{1,9})\.(\d{1,9})(?:\.(\d{1,9}))?(.*)", version or "")
    if parts is None:
        return None
    release = int(parts[1]), int(parts[2]), int(parts[3] or 0)
    if release <= PADDED_UNTIL:
        return True
    early = re.match(r"\.?(a|b|rc|dev)", parts[4]) is not None
    return False if release > DENSE_SINCE or (release == DENSE_SINCE and not early) else None


def from_words(name: str, words: Tensor, bits: int, count: int, padded: bool) -> Tensor:
    """Words as canonical codes; CheckpointError for bits that are set beyond the codes.

    Shapes:
        words     [R, width(count)]           int32
        returns   [R, ceil(count * bits / 8)] uint8
    """
    octets = _as(torch.uint8, words)
    if padded and 32 % bits:
        per_word = 32 // bits
        each = unpack(octets.unflatten(1, (-1, 4)), bits, per_word).flatten(1)
        beyond = each[:, count:].any() or (octets[:, 3::4] >= 2 ** (bits * per_word - 24)).any()
        codes = pack(each[:, :count], bits)
    else:
        nbytes, rest = -(-count * bits // 8), count * bits % 8
        codes = octets[:, :nbytes].contiguous()
        beyond = octets[:, nbytes:].any() or (rest > 0 and (codes[:, -1] >= 2**rest).any())
    if beyond:
        raise CheckpointError(f"{name} has bits set beyond its {count} codes of {bits} bits: weight_shape, num_bits or version is wrong")
    return codes


def to_words(codes: Tensor, bits: int, count: int, padded: bool) -> Tensor:
    """Invert `from_words`."""
    if padded and 32 % bits:
        per_word = 32 // bits
        each = F.pad(unpack(codes, bits, count), (0, -count % per_word)).unflatten(1, (-1, per_word))
        return _as(torch.int32, pack(each, bits).flatten(1))  # 28 or 30 bits: 4 bytes
    return _as(torch.int32, F.pad(codes, (0, -codes.shape[1] % 4)))


def _as(dtype: torch.dtype, rows: Tensor) -> Tensor:
    """Each row's bytes as another type; `contiguous` alone keeps strides of a single row or column that `view` refuses."""
    return rows.clone(memory_format=torch.contiguous_format).view(dtype)
