"""ggml's vector codebooks: raw bytes of IQ1, IQ2 and IQ3 to integer codes and scales.

An index names 4 or 8 weights at once in a table (ggml_grids.py); the codes are those weights' integers with their signs, and biased by
128. They have no `join`, as the indices cannot be told from the integers without a search.

Shapes of every `split_<type>`:
    raw        [N, B, bytes of a block]    uint8
    returns    Parts (format.py) with codes [N, B, 256], d [N, B, 1] float32, scales [N, B, 8 or 16] uint8, odd
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.formats.format import Parts
from qkernels.formats.ggml_blocks import half
from qkernels.formats.ggml_grids import grid
from qkernels.formats.packing import pack, unpack


def _biased(values: Tensor) -> Tensor:
    """int8 to the codes of Int(8, 128)."""
    return values.contiguous().view(torch.uint8) ^ 0x80


def _points(name: str, low: Tensor, high: Tensor | None = None) -> Tensor:
    """The weights that indices name, [N, B, 256] int8; `high` are the bits of an index above its byte."""
    index = low.int() if high is None else low.int() | high.int() << 8
    return grid(name).to(low.device)[index].flatten(-2)


def _signed(values: Tensor, signs: Tensor) -> Tensor:
    """Codes of values whose sign bits are one little-endian stream, a byte for 8 values."""
    return _biased(values * (1 - 2 * unpack(signs, 1, values.shape[-1]).view(torch.int8)))


def _even(signs: Tensor) -> Tensor:
    """The sign byte of 7 bits: the eighth makes the count of negative values even."""
    parity = signs ^ signs >> 4
    parity = parity ^ parity >> 2
    return signs | ((parity ^ parity >> 1) & 1) << 7


def _odd(scales: Tensor) -> Tensor:
    """ggml multiplies by (scale + 1/2), half of this odd number."""
    return 2 * scales + 1


def _words(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Sign bytes [N, B, 32] and scales [N, B, 8] from little-endian words of 4 x 7 bits of signs and 4 bits of scale."""
    words = raw.unflatten(-1, (8, 4))
    return _even(unpack(words, 7, 4)).flatten(-2), _odd(words[..., 3] >> 4)


def split_iq2_xxs(raw: Tensor) -> Parts:
    indices, words = raw[..., 2:].unflatten(-1, (8, 2, 4)).unbind(-2)
    signs, scales = _words(words.flatten(-2))
    return Parts(_signed(_points("iq2_xxs", indices.flatten(-2)), signs), half(raw, 0).float() / 8, scales)


def split_iq2_xs(raw: Tensor) -> Parts:
    words = raw[..., 2:66].contiguous().view(torch.int16)
    signs = _even((words >> 9 & 127).to(torch.uint8))
    codes = _signed(_points("iq2_xs", words & 511), signs)
    return Parts(codes, half(raw, 0).float() / 8, _odd(unpack(raw[..., 66:], 4, 16)))


def split_iq2_s(raw: Tensor) -> Parts:
    points = _points("iq2_s", raw[..., 2:34], unpack(raw[..., 66:74], 2, 32))
    return Parts(_signed(points, raw[..., 34:66]), half(raw, 0).float() / 8, _odd(unpack(raw[..., 74:], 4, 16)))


def split_iq3_xxs(raw: Tensor) -> Parts:
    signs, scales = _words(raw[..., 66:])
    return Parts(_signed(_points("iq3_xxs", raw[..., 2:66]), signs), half(raw, 0).float() / 4, scales)


def split_iq3_s(raw: Tensor) -> Parts:
    points = _points("iq3_s", raw[..., 2:66], unpack(raw[..., 66:74], 1, 64))
    return Parts(_signed(points, raw[..., 74:106]), half(raw, 0).float(), _odd(unpack(raw[..., 106:], 4, 8)))


def _shifted(points: Tensor, down: Tensor) -> Tensor:
    """Codes of IQ1: eighths of points that are moved by an eighth, down where the bit says so; one bit for as many points as there are."""
    shift = 1 - 2 * down.view(torch.int8)
    return _biased(8 * points + shift.repeat_interleave(points.shape[-1] // shift.shape[-1], -1))


def split_iq1_s(raw: Tensor) -> Parts:
    words = raw[..., 34:].unflatten(-1, (8, 2))
    fields = unpack(words, 3, 5)  # high bits of four indices, and the scale
    points = _points("iq1_s", raw[..., 2:34], fields[..., :4].flatten(-2))
    return Parts(_shifted(points, words[..., 1] >> 7), half(raw, 0).float() / 8, _odd(fields[..., 4]))


def split_iq1_m(raw: Tensor) -> Parts:
    nibbles, words = unpack(raw[..., 32:48], 4, 32), raw[..., 48:]
    points = _points("iq1_s", raw[..., :32], nibbles & 7)
    d = pack(unpack(words, 4, 16)[..., 3::4], 4)  # the float16 is spread over the top nibbles of four words
    return Parts(_shifted(points, nibbles >> 3), half(d, 0).float() / 8, _odd(unpack(words.unflatten(-1, (4, 2)), 3, 4).flatten(-2)))
