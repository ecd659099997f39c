"""t(M) for every M: a kernel must not become much slower by one more row."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .check import check
from .ours import contestant
from .run import copies_of, inputs
from .shapes import LayerShape
from .timing import Pace, Rotation, interleave

PACE = Pace(rounds=9, slot_s=0.01, pause_s=0)  # one thread pool only: nobody to wait for


@dataclass(frozen=True)
class Cliff:
    """Times of one layer for M = 1, 2, …; `worst_ratio` = t(worst_m + 1) / t(worst_m)."""

    contestant: str
    shape: str
    median_us: list[float]
    worst_m: int
    worst_ratio: float


def step_ratios(rounds: list[tuple[float, ...]]) -> list[float]:
    """Turn `rounds[m][round]` into t(m+1)/t(m): the median over rounds, as both were measured within the same moment."""
    pairs = itertools.pairwise(rounds)
    return [statistics.median(after / before for before, after in zip(a, b, strict=False)) for a, b in pairs]


def measure_cliff(
    format: str, compute: str, dtype: str, shape: LayerShape, threads: int, up_to: int = 65, say: Callable[[str], None] = lambda _: None
) -> Cliff:
    """Time one layer at M = 1…up_to, all M in turn. Raises CheckFailed when a result is wrong."""
    entry = contestant(format, compute, dtype)
    say(f"cliff: preparing {entry.name}")
    weight = torch.randn(shape.n, shape.k, generator=torch.Generator().manual_seed(0)) * shape.k**-0.5
    prepared = entry.prepare(weight, threads)
    copies = copies_of(prepared)
    following = itertools.cycle(copies)  # shared by all M: none may find weights in the cache that the one before left there
    rotations = {}
    for m, x in inputs(shape, range(1, up_to + 1)).items():
        x = x.to(entry.dtype)
        check(prepared, prepared.arithmetic or entry.arithmetic, x, copies[0](x))
        rotations[str(m)] = Rotation([lambda x=x: next(following)(x)])
    say(f"cliff: timing {entry.name}, M = 1…{up_to}")
    timings = interleave(rotations, PACE).values()
    for error in (t for t in timings if isinstance(t, Exception)):
        raise error
    ratios = step_ratios([t.rounds_us for t in timings])
    worst = max(range(len(ratios)), key=ratios.__getitem__)
    return Cliff(entry.name, shape.name, [t.median_us for t in timings], worst + 1, ratios[worst])
