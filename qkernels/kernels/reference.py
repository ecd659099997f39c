"""The reference kernel: decode the whole weight in plain torch, then `F.linear`. Runs every format everywhere; fast nowhere."""

from __future__ import annotations

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from qkernels import reference
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.kernels.registry import Kernel, Problem, register


class Packed(NamedTuple):
    """The canonical tensors as they are."""

    format: QuantFormat
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    tensor_scale: Tensor | None
    perm: Tensor | None


def prepare(q: QuantTensor) -> Packed:
    return Packed(q.format, q.shape, q.codes, q.scales, q.zeros, q.tensor_scale, q.perm)


def restore(packed: Packed) -> QuantTensor:
    return QuantTensor(*packed)


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return F.linear(x, reference.decode(restore(packed)).to(x.dtype), bias)


def _cost(p: Problem) -> float:
    """A few passes of fp32 over the weight at some 2 GB/s, then a 16-bit matmul at some 100 GFLOP/s."""
    return p.n * p.k * (40 / 2e3 + 2 * p.rows / 1e5)


KERNEL = register(
    Kernel(
        name="reference",
        backend="reference",
        source="qkernels.reference",
        compute="float",
        why_not=lambda p: None,
        cost=_cost,
        prepare=prepare,
        restore=restore,
        run=run,
        packed_type=Packed,
    )
)
