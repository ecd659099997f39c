"""What the Hopper kernels of csrc/cuda share: which tile, whether tiles are cut along K, and what a launch gets besides its operands."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.kernels.cuda import library
from qkernels.kernels.registry import Problem
from qkernels.kernels.triton.launch import counters_of, gpu_of
from qkernels.kernels.triton.launch import why_not as triton_why_not

FEW = 64  # rows of x: up to here the Triton kernels are faster
ROWS = 128  # of the weight, in a tile
STEP = 128  # columns
TOKENS = 1024  # of so many tiles are worked on side by side, for the cache's sake


class Tile(NamedTuple):
    """A size of tiles, and what it costs on an H200, in µs: a step, and a launch where no tile is cut or some are."""

    tokens: int
    step: float
    whole: float
    cut: float


class Plan(NamedTuple):
    """How a product is cut: tokens of a tile, and whether all tiles stay whole."""

    tokens: int
    whole: bool


@functools.lru_cache(maxsize=8192)
def plan(tiles: tuple[Tile, ...], n: int, m: int, steps: int, processors: int) -> Plan:
    """The cheapest way for x [m, 128 steps] and a weight [n, ...].

    Whole tiles come in waves of one for every processor; cut ones keep all busy, but their sums have to meet.
    """

    def costs(t: Tile) -> tuple[tuple[float, Plan], tuple[float, Plan]]:
        count = -(-n // ROWS) * -(-m // t.tokens)
        waves = -(-count // processors) * steps * t.step + t.whole
        return (waves, Plan(t.tokens, True)), (count * steps * t.step / processors + t.cut, Plan(t.tokens, False))

    return min(way for t in tiles for way in costs(t))[1]


def launch(op: Any, p: Plan, operands: tuple[Any, ...], out: Tensor, *more: int) -> None:
    """Call an op of csrc/cuda on the current stream; `more`: its own numbers."""
    device = out.device
    processors, stream = gpu_of(device).processors, torch._C._cuda_getCurrentRawStream(device.index)
    parts = None if p.whole else torch.empty(processors * ROWS * p.tokens, dtype=torch.float32, device=device)
    flags = counters_of(device, stream)
    op(*operands, out, parts, flags, *more, p.tokens, processors, TOKENS // p.tokens, p.whole, True, stream)


def why_not(p: Problem) -> str | None:
    """What none of these kernels can do."""
    if reason := triton_why_not(p):  # few rows are left to it
        return reason
    if p.device.sm != 90:
        return f"is compiled for sm90 (Hopper) alone, not sm{p.device.sm}"
    if not p.device.compiled:
        return library.why_missing() or "the compiled library is missing"
    return None if p.n % 16 == 0 else f"N = {p.n}: multiples of 16 are taken"
