"""What takes part in a benchmark: a contestant prepares a layer from a float weight and gives callable copies of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Kind = Literal["qkernels", "torch", "peer"]
Arithmetic = Literal["int8", "bf16", "fp32"]  # which measured peak bounds the speed
Layer = Callable[[Tensor], Tensor]


class CheckFailed(Exception):
    """A result is wrong; the message says by how much. Its speed is not worth a number."""


@dataclass(frozen=True)
class Deviation:
    """How far an output lies from the float64 product of the weights' meaning: NMSE and largest absolute error."""

    nmse: float
    max_abs: float


@dataclass(frozen=True)
class Prepared:
    """A layer, quantised once, of which `make` gives any number of copies that share no memory.

    weight       [N, K] float32: what the stored numbers mean
    nbytes       bytes of the stored weight (codes, scales, zeros) that one call has to read
    check        own comparison instead of the general one: (x [M, K], y [M, N]), raises CheckFailed
    """

    weight: Tensor
    nbytes: int
    make: Callable[[], Layer]
    kernel: str = ""
    arithmetic: Arithmetic | None = None  # where it is known only after preparation
    check: Callable[[Tensor, Tensor], None] | None = None


@dataclass(frozen=True)
class Contestant:
    """One way to compute x [M, K] @ W.T.

    prepare      (weight [N, K] float32, threads) -> Prepared; may raise, which is reported
    dtype        of the activations that it is given; its output is compared as it comes
    package      module that must be importable, or "" for torch and qkernels
    absent       instead of `package`, for what is no module: says why it is not there, or ""
    """

    name: str
    kind: Kind
    weights: str
    arithmetic: Arithmetic
    dtype: torch.dtype
    prepare: Callable[[Tensor, int], Prepared]
    package: str = ""
    distribution: str = ""  # the name under which the package is installed, where it differs
    absent: Callable[[], str] | None = None


def groupwise(weight: Tensor, group: int, top: int) -> tuple[Tensor, Tensor]:
    """Quantise symmetrically to -top…top: (codes [N, K] int8, scales [N, K/group] float32). For the peers' layers."""
    n, k = weight.shape
    blocks = weight.view(n, k // group, group)
    scales = blocks.abs().amax(dim=2).clamp(min=1e-8) / top
    codes = (blocks / scales[..., None]).round().clamp(-top, top)
    return codes.view(n, k).to(torch.int8), scales


def expand(codes: Tensor, scales: Tensor) -> Tensor:
    """What codes [N, K] and scales [N, K/group] mean, [N, K] float32."""
    n, k = codes.shape
    return (codes.view(n, scales.shape[1], -1).float() * scales.float()[..., None]).view(n, k)


def nbytes_of(*tensors: Tensor) -> int:
    return sum(t.nbytes for t in tensors)
