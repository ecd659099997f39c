"""The packed layout of the Triton kernels, and its inverse.

Codes of 2, 4 and 8 bits lie in tiles of T = 512 / bits columns: in each, every output row is 16 words of 32 bits, 64 bytes, and the rows
follow each other without gaps. In what order: that of the left operand of a tensor core, whose lane c of four holds columns
16 j + 8 h + 2 c + e of a row. A lane loads its four words as 16 bytes and finds in them the columns that it has to multiply:

    column 16 (J s' + s) + 8 h + 2 c + e  ->  word 4 c + s', code 2 (2 s + h) + e           c, s' < 4; h, e < 2; J = T / 64 steps a word
    tables of 4 bits  code j of a word lies at bit 4 j                    (the selectors of a byte permutation)
    all others        code 2 i + e of a word lies at bit bits * i + 16 e  (one mask gives the pair e = 0, 1 in the halves of a register)

K is padded to whole tiles with code 0. Scales and zeros lie in the same order: for every tile, or for every group if those are wider, one
run of its groups for each row, or for each block of rows that share them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.format import SCALE_DTYPES, Code
from qkernels.formats.packing import pack, unpack
from qkernels.kernels.registry import Problem

WORDS = 16  # of a row in a tile
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # padding and transposing work for these, not for every 8-bit float


class Packed(NamedTuple):
    """A weight as the Triton kernels read it.

    Shapes, with T = 512 / bits, and R = N rows, or blocks of rows that share scales:
        weight        [ceil(K / T), N, 16]     int32
        scales        [S, R, P]                uint8 for e4m3 and e8m0, else the scale type; P groups a tile and S tiles, or S groups
        zeros         [S, R, P]                uint8 or the scale type
        tensor_scale  [1]                      float32
        perm          [K]                      int32
    """

    format: QuantFormat
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None
    perm: Tensor | None


def tile_columns(format: QuantFormat) -> int:
    """Columns of a tile."""
    return 32 * WORDS // format.bits


def groups_per_tile(format: QuantFormat, n: int, k: int) -> int:
    """Groups of a row within one tile: 1 where a group fills a tile or more."""
    group = format.group_extent(n, k)[1]
    return 1 if group == k else max(1, tile_columns(format) // group)


def is_table(code: Code) -> bool:
    """Whether codes are looked up: codebooks and floats of 4 bits."""
    return code.bits == 4 and not isinstance(code, Int)


def prepare(q: QuantTensor) -> Packed:
    """Re-lay a canonical weight in tiles."""
    (n, k), bits = q.shape, q.format.bits
    assert q.scales is not None
    codes = F.pad(unpack(q.codes, bits, k), (0, -k % tile_columns(q.format)))
    steps = tile_columns(q.format) // 64
    split = codes.view(n, -1, 4, steps, 2, 4, 2).permute(1, 0, 5, 2, 3, 4, 6)  # tile, row, c, s', s, h, e
    words = _bit_order(split.flatten(4).flatten(2, 3), q.format)
    weight = pack(words.contiguous(), bits).view(torch.int32).squeeze(-1)
    scales = _tiled(q.scales, q.format, n, k)
    zeros = None if q.zeros is None else _tiled(q.zeros, q.format, n, k)
    if weight.is_cuda:  # a kernel may fetch weights while the one before it still ends: that one must not be who writes them
        torch.cuda.current_stream(weight.device).synchronize()
    return Packed(
        q.format, q.shape, weight, scales.view(torch.uint8) if scales.element_size() == 1 else scales,
        zeros, q.tensor_scale, q.perm,
    )  # fmt: skip


def restore(packed: Packed) -> QuantTensor:
    """Invert `prepare`, bit for bit."""
    format, (n, k) = packed.format, packed.shape
    steps = tile_columns(format) // 64
    words = unpack(packed.weight.view(torch.uint8).view(-1, n, WORDS, 4), format.bits, 32 // format.bits)
    split = _bit_order(words, format, invert=True).view(-1, n, 4, 4, steps, 2, 2)
    codes = split.permute(1, 0, 3, 4, 5, 2, 6).reshape(n, -1)[:, :k]
    scales = _canonical(packed.scales, format, n, k).view(SCALE_DTYPES[format.scale])
    zeros = None if packed.zeros is None else _canonical(packed.zeros, format, n, k)
    return QuantTensor(format, packed.shape, pack(codes.contiguous(), format.bits), scales, zeros, packed.tensor_scale, packed.perm)


def _bit_order(words: Tensor, format: QuantFormat, invert: bool = False) -> Tensor:
    """Codes of a word [..., 2 i + e] in the order of their bits, or back."""
    if is_table(format.code):
        return words
    pairs = words.unflatten(-1, (2, -1) if invert else (-1, 2))
    return pairs.transpose(-1, -2).flatten(-2)


def _tiled(per_group: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    """[R, G] -> [S, R, P]."""
    per_tile = groups_per_tile(format, n, k)
    raw = per_group.view(_INTS[per_group.element_size()])
    padded = F.pad(raw, (0, -raw.shape[1] % per_tile))
    return padded.view(len(raw), -1, per_tile).transpose(0, 1).contiguous().view(per_group.dtype)


def _canonical(tiled: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    raw, (rows, groups) = tiled.view(_INTS[tiled.element_size()]), format.group_shape(n, k)
    return raw.transpose(0, 1).reshape(rows, -1)[:, :groups].contiguous().view(tiled.dtype)


def why_not(p: Problem) -> str | None:
    """What the layout cannot hold."""
    if p.format.block is not None:
        return f"{p.format.name} keeps its blocks; codes of one width and groups are held"
    bits, code = p.format.bits, p.format.code
    if not (isinstance(code, Int) and bits in (2, 4, 8)) and not is_table(code) and code.name not in ("e4m3", "e5m2"):
        return f"code {code.name} has {bits} bits; integers of 2, 4 and 8 bits, tables of 4 bits, e4m3 and e5m2 are held"
    group = p.format.group_extent(p.n, p.k)[1]
    tile = tile_columns(p.format)
    least = tile // 4 if bits == 8 else tile // 8  # two groups a word: its columns' halves
    if group < p.k and group % tile and (tile % group or group < least):
        return f"groups of {group}; of {bits} bits, multiples of {tile} and divisors of it down to {least} are held"
    return None
