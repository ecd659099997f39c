"""qkernels' own contestants on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor, nn

from .. import ours
from ..base import Contestant, Prepared


def contestants(formats: list[str], computes: list[str], dtype: str) -> list[Contestant]:
    """Every format with every kind of arithmetic, or `format:compute` with that one, or `format:compute:kernel` with that kernel.

    Each copy of a layer owns all that it reads.
    """
    asked = [parts for f in formats for parts in ([f.split(":")] if ":" in f else [[f, compute] for compute in computes])]
    found = [ours.contestant(format, compute, dtype, *kernel) for format, compute, *kernel in asked]
    return [replace(c, prepare=_owning(c.prepare)) for c in found]


def _owning(prepare: Callable[[Tensor, int], Prepared]) -> Callable[[Tensor, int], Prepared]:
    def prepared(weight: Tensor, threads: int) -> Prepared:
        made = prepare(weight, threads)
        return replace(made, make=lambda: owning(made.make()))

    return prepared


def owning(layer: nn.Module) -> nn.Module:
    """Give a layer its own memory: a kernel may keep tensors as they were given, and those would be in the cache for all copies."""
    for parameter in layer.parameters():
        parameter.data = parameter.data.clone()
    return layer
