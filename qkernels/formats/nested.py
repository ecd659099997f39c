"""Nested blocks (ggml's) taken apart into what kernels hold: codes of one width, numbers of the groups, and what multiplies those."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from qkernels.formats.format import Parts, QuantFormat
from qkernels.formats.tensor import QuantTensor


class Apart(NamedTuple):
    """A weight [N, K] of B nested blocks a row, with G groups that share the finest scale.

    Shapes:
        codes    [N, K]           uint8
        scales   [N, G]           float16, float8 or float32; int8 or uint8 where blocks have a scale of scales
        minima   [N, G]           float16; uint8 where blocks have one for minima, too
        outer    [N, B (1 or 2)]  float16: of every block what multiplies its scales, and then its minima
    """

    codes: Tensor
    scales: Tensor
    minima: Tensor | None
    outer: Tensor | None


def is_kept(format: QuantFormat) -> bool:
    """Whether only its raw bytes give the same bytes again: several have the same parts."""
    return format.block is not None and format.block.join is None


def parts_of(format: QuantFormat) -> Parts:
    """Those of two blocks of which every bit is set: what there is, of which dtype, and the largest whole numbers."""
    assert format.block is not None
    return format.block.split(torch.full((1, 2, format.block.nbytes), 255, dtype=torch.uint8, device="cpu"))


def apart(q: QuantTensor) -> Apart:
    """Take the blocks of a weight apart."""
    assert q.format.block is not None
    parts = q.format.block.split(q.codes.unflatten(-1, (-1, q.format.block.nbytes)))
    inner = (parts.d, parts.m, None) if parts.scales is None else (parts.scales, parts.mins, parts.d)
    if parts.scales is not None and parts.m is not None:
        inner = *inner[:2], torch.cat([parts.d, parts.m], -1)
    scales, minima, outer = (None if t is None else t.flatten(1) for t in inner)
    assert scales is not None
    return Apart(parts.codes.flatten(1), scales, minima, outer)


def joined(format: QuantFormat, a: Apart) -> Tensor:
    """Invert `apart`: raw blocks [N, bytes]; float8 may come as uint8."""
    block = format.block
    assert block is not None and block.join is not None
    blocks = a.codes.shape[1] // block.elements, -1
    codes, scales, minima, outer = (None if t is None else t.unflatten(1, blocks) for t in a)
    assert codes is not None and scales is not None
    if outer is None:
        return block.join(Parts(codes, scales.view(parts_of(format).d.dtype), m=minima)).flatten(1)
    d, *m = outer.split(1, -1)
    return block.join(Parts(codes, d, scales, m[0] if m else None, minima)).flatten(1)


def why_not(format: QuantFormat) -> str | None:
    """Why blocks do not come apart into groups as long as the format says, with at most one float16 of a block that multiplies each."""
    assert format.block is not None
    parts = parts_of(format)
    finest = parts.d if parts.scales is None else parts.scales
    if format.group != (1, format.block.elements // finest.shape[-1]):
        return f"{format.name} has {finest.shape[-1]} scales a block, which its group {format.group} does not say"
    outer = [t for t in (parts.d, parts.m) if t is not None and parts.scales is not None]
    if any(t.dtype != torch.float16 or t.shape[-1] != 1 for t in outer):
        return f"{format.name} has scales of scales that are not one float16 a block"
    return None
