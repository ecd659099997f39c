"""The same numbers said in other formats, so that another layout can hold a weight without a change of any of them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor

from qkernels import reference
from qkernels.formats import Int, QuantFormat, QuantStack, QuantTensor
from qkernels.formats.format import scale_type
from qkernels.formats.packing import pack

_FEW_ROWS = 64  # a multiple of the rows that any layout wants


def forms(q: QuantTensor) -> Iterator[QuantTensor]:
    """The weight itself, then what else says the same.

    Blocks become groups, minima zero points, zero points of half the range none, and fp32 or bf16 scales that are fp16 numbers such.
    """
    yield q
    for change in (_grouped, _of_minima, _symmetric, _narrowed):
        changed = change(q)
        if changed is not None:
            yield (q := changed)


def few_rows(q: QuantTensor) -> QuantTensor:
    """The first rows of a weight, to ask a writer about its kind."""
    n = min(_FEW_ROWS, q.shape[0])
    if q.format.group[0] != 1:
        return q
    rows = {field: t[:n] if field in ("codes", "scales", "zeros") else t for field, t in q.tensors().items()}
    return QuantTensor.from_tensors(q.format, (n, q.shape[1]), rows)


def _grouped(q: QuantTensor) -> QuantTensor | None:
    """Blocks as codes and groups. The product of two levels of scales is an fp32 number: of 11 bits times 8."""
    block = q.format.block
    if block is None or q.format.bits > q.format.bits_per_weight():  # of vectors, whose elements would be stored one by one
        return None
    parts = block.split(q.codes.unflatten(-1, (-1, block.nbytes)))
    if parts.m is not None and parts.mins is not None:
        return None  # minima of two levels have no form in groups that a layout holds
    scales = parts.d
    if parts.scales is not None:
        finer = parts.scales.shape[-1] // parts.d.shape[-1]
        scales = parts.d.float().repeat_interleave(finer, -1) * parts.scales.float()
    zeros = None if parts.m is None else parts.m.flatten(1)
    size = block.elements // scales.shape[-1]
    format = QuantFormat(q.format.code, (1, size), scale_type(scales.dtype), "none" if zeros is None else "min")
    return QuantTensor(format, q.shape, pack(parts.codes.flatten(1), format.bits), scales.flatten(1), zeros, perm=q.perm)


def _of_minima(q: QuantTensor) -> QuantTensor | None:
    """Minima that are a whole number of steps as zero points."""
    if q.format.zero != "min" or q.scales is None or q.zeros is None or q.format.bits > 8:
        return None
    steps = torch.where(q.scales == 0, 0.0, -q.zeros.double() / q.scales.double()).round().clamp(0, 2**q.format.bits - 1)
    if not torch.equal(-steps * q.scales.double(), q.zeros.double()):
        return None
    return replace(q, format=replace(q.format, zero="int", name=""), zeros=steps.to(torch.uint8), origin={})


def _symmetric(q: QuantTensor) -> QuantTensor | None:
    middle = 2 ** (q.format.bits - 1)
    if q.format.zero != "int" or q.zeros is None or not bool((q.zeros == middle).all()):
        return None
    return replace(q, format=replace(q.format, code=Int(q.format.bits, middle), zero="none", name=""), zeros=None, origin={})


def _narrowed(q: QuantTensor) -> QuantTensor | None:
    if q.format.block is not None or q.format.scale not in ("f32", "bf16") or q.scales is None:
        return None
    held: list[Tensor | None] = [q.scales, q.zeros if q.format.zero in ("float", "min") else None]
    if any(t is not None and not torch.equal(t.half().float(), t.float()) for t in held):
        return None
    zeros = q.zeros if held[1] is None else held[1].half()
    return replace(q, format=replace(q.format, scale="f16", name=""), scales=q.scales.half(), zeros=zeros, origin={})


def dense(value: QuantTensor | QuantStack) -> Tensor:
    """[N, K], or [E, N, K] of a stack, float32."""
    if isinstance(value, QuantTensor):
        return reference.decode(value)
    return torch.stack([reference.decode(value[e]) for e in range(len(value))])


def code_bits(format: QuantFormat) -> int:
    """Bits of a code: those of a weight, without the share of scales, which is at most one."""
    return min(8, max(2, math.ceil(format.bits_per_weight() - 1)))


def has_minima(value: QuantTensor | QuantStack) -> bool:
    block = value.format.block
    if block is None:
        return value.format.zero != "none"
    q = value if isinstance(value, QuantTensor) else value[0]
    return block.split(q.codes[:1].unflatten(-1, (-1, block.nbytes))).m is not None
