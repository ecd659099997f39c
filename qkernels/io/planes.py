"""Codes in bit planes, as GPTQModel's "gptq_p" stores them: 32 codes take `bits` words, of which the first hold all codes' low bits.

A plane of width w is w words with all 32 codes' next w bits, one after the other from the lowest bit on; widths of 2, 4 and 8 bits are a
single plane, which is the same as one stream. Source: the description in GPTQModel's planar_packing, written from scratch.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats.packing import pack, unpack
from qkernels.io.layers import in_order

WIDTHS = {2: (2,), 3: (2, 1), 4: (4,), 5: (4, 1), 6: (4, 2), 7: (4, 2, 1), 8: (8,)}  # bits -> planes, from the low bits on
_RUN = 32  # codes whose planes lie together


def from_planes(words: Tensor, bits: int, count: int) -> Tensor:
    """Codes of words that run along the last axis.

    Shapes:
        words      [..., B * bits]    int32
        returns    [..., count]       uint8, count <= 32 B
    """
    planes = in_order(words).view(torch.uint8).unflatten(-1, (-1, bits * _RUN // 8)).split([w * _RUN // 8 for w in WIDTHS[bits]], -1)
    codes, unit = torch.zeros((), dtype=torch.uint8), 1
    for width, plane in zip(WIDTHS[bits], planes):
        codes, unit = codes + unpack(plane, width, _RUN) * unit, unit * 2**width
    return codes.flatten(-2)[..., :count]


def to_planes(codes: Tensor, bits: int) -> Tensor:
    """Invert `from_planes`; what fills the last run is 0."""
    rest, planes = F.pad(codes, (0, -codes.shape[-1] % _RUN)).unflatten(-1, (-1, _RUN)), []
    for width in WIDTHS[bits]:
        planes.append(pack(rest & (2**width - 1), width))
        rest = rest // min(2**width, 128)  # 8 bits are a single plane
    return in_order(torch.cat(planes, -1).flatten(-2)).view(torch.int32)
