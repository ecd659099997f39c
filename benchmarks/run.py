"""Measure contestants over layer shapes: prepare, check, rotate, time in turn."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from .base import Arithmetic, Contestant, Deviation, Layer, Prepared
from .check import check
from .machine import Roofline, last_level_cache_bytes, reader
from .shapes import LayerShape
from .timing import Pace, Rotation, Timing, interleave

LEAST_ROTATION_BYTES = 128 << 20
MOST_COPIES = 256  # of layers so small that more would take longer to make than to measure
READER = "reading memory beside "  # takes its turn beside every contestant: the bandwidth of a shared machine changes from second to second
Say = Callable[[str], None]  # progress: called with what is being done


@dataclass
class Entrant:
    """A contestant with its layer of the current shape."""

    contestant: Contestant
    arithmetic: Arithmetic
    nbytes: int = 0
    kernel: str = ""
    copies: list[Layer] = field(default_factory=list)
    deviations: dict[int, Deviation] = field(default_factory=dict)
    faults: dict[int, str] = field(default_factory=dict)  # by M: a wrong result or an error
    unprepared: str = ""  # why there is no layer at all
    unsupported: bool = False  # … because it says that it does not take this problem


@dataclass(frozen=True)
class Result:
    """One contestant on one shape and M. Times in µs; `share` = limit / median; `ok` False: wrong, hence no times.

    read_gbs is what reading alone reached in the same rounds; read_share the part of it that reading `nbytes` makes of the time,
    a median over the rounds.
    """

    contestant: str
    kind: str
    weights: str
    shape: str
    n: int
    k: int
    m: int
    ok: bool
    reason: str = ""
    skipped: bool = False  # it does not take this problem; not an error
    kernel: str = ""
    arithmetic: str = ""
    nbytes: int = 0  # of the stored weight
    traffic: int = 0  # bytes that one call moves: weight, activations, output
    nmse: float | None = None
    max_abs: float | None = None
    timing: dict | None = None
    read_gbs: float | None = None
    read_share: float | None = None
    limit_us: float | None = None
    share: float | None = None
    times_over: dict[str, float] = field(default_factory=dict)  # how many times faster than each other contestant


def rotation_bytes() -> int:
    """Weights have to rotate through more than this: 128 MB, or one and a half times the largest cache."""
    return max(LEAST_ROTATION_BYTES, last_level_cache_bytes() * 3 // 2)


def copies_of(prepared: Prepared, rotation: int | None = None) -> list[Layer]:
    """Copies of a layer that together fill `rotation` bytes."""
    wanted = math.ceil((rotation_bytes() if rotation is None else rotation) / prepared.nbytes)
    return [prepared.make() for _ in range(min(wanted, MOST_COPIES))]


def inputs(shape: LayerShape, ms: Sequence[int]) -> dict[int, Tensor]:
    """Gaussian activations [M, K] float32, the same on every run."""
    generator = torch.Generator().manual_seed(1)
    return {m: torch.randn(m, shape.k, generator=generator) for m in ms}


def enter(contestant: Contestant, weight: Tensor, xs: dict[int, Tensor], threads: int, rotation: int) -> Entrant:
    """Prepare a contestant, check its results at every M, and copy its layer until the copies fill `rotation` bytes."""
    entrant = Entrant(contestant, contestant.arithmetic)
    try:
        prepared = contestant.prepare(weight, threads)
        entrant.arithmetic = prepared.arithmetic or contestant.arithmetic
        entrant.nbytes, entrant.kernel = prepared.nbytes, prepared.kernel
        layer = prepared.make()
    except Exception as error:
        entrant.unprepared = first_line(error)
        entrant.unsupported = type(error).__name__ == "UnsupportedError"
        return entrant
    for m, x in xs.items():
        _check_at(entrant, prepared, layer, m, x.to(contestant.dtype))
    if len(entrant.faults) < len(xs):
        entrant.copies = copies_of(prepared, rotation)
    return entrant


def _check_at(entrant: Entrant, prepared: Prepared, layer: Layer, m: int, x: Tensor) -> None:
    try:
        entrant.deviations[m] = check(prepared, entrant.arithmetic, x, layer(x))
    except Exception as error:
        entrant.faults[m] = first_line(error)


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def measure_shape(
    shape: LayerShape,
    contestants: Sequence[Contestant],
    ms: Sequence[int],
    threads: int,
    pace: Pace,
    say: Say = lambda _: None,
) -> list[Result]:
    """Measure every contestant on one shape at every M; the results of one M were timed in turn, so compare within it."""
    weight = torch.randn(shape.n, shape.k, generator=torch.Generator().manual_seed(0)) * shape.k**-0.5
    xs = inputs(shape, ms)
    entrants = []
    read = reader(rotation_bytes())
    for contestant in contestants:
        say(f"{shape.name}: preparing {contestant.name}")
        entrants.append(enter(contestant, weight, xs, threads, rotation_bytes()))
    results = []
    for m, x in xs.items():
        say(f"{shape.name}: timing M={m}")
        results += _measure_m(shape, m, x, entrants, pace, read)
    return results


def _measure_m(
    shape: LayerShape, m: int, x: Tensor, entrants: list[Entrant], pace: Pace, read: Callable[[], object] | None
) -> list[Result]:
    rotations: dict[str, Rotation] = {}
    for entrant in entrants:
        if not entrant.unprepared and m not in entrant.faults:
            rotations[entrant.contestant.name] = _rotation(entrant, x)
            rotations |= {READER + entrant.contestant.name: Rotation([read])} if read else {}
    timings = interleave(rotations, pace)
    reading = {name: timings.pop(name) for name in rotations if name.startswith(READER)}
    for entrant in entrants:
        if isinstance(error := timings.get(entrant.contestant.name), Exception):
            entrant.faults[m] = first_line(error)
    good = {name: t for name, t in timings.items() if isinstance(t, Timing)}
    results = [result_of(shape, m, entrant, good) for entrant in entrants]
    return [_with_reading(result, reading.get(READER + result.contestant)) for result in results]


def _with_reading(result: Result, reading: Timing | Exception | None) -> Result:
    """Add what reading reached in the turns beside the contestant's, and the contestant's share of it, round by round."""
    if not isinstance(reading, Timing):
        return result
    gbs = [rotation_bytes() / us / 1e3 for us in reading.rounds_us]
    rounds_us = result.timing["rounds_us"] if result.timing else []
    shares = [result.nbytes / us / 1e3 / g for us, g in zip(rounds_us, gbs, strict=False)]
    return replace(result, read_gbs=statistics.median(gbs), read_share=statistics.median(shares) if shares else None)


def _rotation(entrant: Entrant, x: Tensor) -> Rotation:
    x = x.to(entrant.contestant.dtype)
    return Rotation([lambda copy=copy: copy(x) for copy in entrant.copies])


def result_of(shape: LayerShape, m: int, entrant: Entrant, timings: dict[str, Timing]) -> Result:
    """Join what is known of one contestant at one M."""
    name, contestant = entrant.contestant.name, entrant.contestant
    base = Result(
        name, contestant.kind, contestant.weights, shape.name, shape.n, shape.k, m,
        ok=name in timings, reason=entrant.unprepared or entrant.faults.get(m, ""), skipped=entrant.unsupported,
        kernel=entrant.kernel, arithmetic=entrant.arithmetic, nbytes=entrant.nbytes,
        traffic=entrant.nbytes + m * (shape.k + shape.n) * contestant.dtype.itemsize,
    )  # fmt: skip
    if m in entrant.deviations:
        base = replace(base, **asdict(entrant.deviations[m]))
    if (own := timings.get(name)) is None:
        return base
    return replace(base, timing=asdict(own), times_over={other: own.times_faster_than(t) for other, t in timings.items() if t is not own})


def with_limits(result: Result, roofline: Roofline | None) -> Result:
    """Add the least time that the machine allows and the share of it that was reached; memory counts as fast as it was in these rounds."""
    if result.timing is None or roofline is None:
        return result
    if result.read_gbs is not None:
        roofline = replace(roofline, read_gbs=result.read_gbs)
    limit_us = roofline.limit_us(result.traffic, 2 * result.m * result.n * result.k, result.arithmetic)
    return replace(result, limit_us=limit_us, share=limit_us / result.timing["median_us"])
