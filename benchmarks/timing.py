"""Time several contestants in turn, on weights that rotate through more memory than the caches hold."""

from __future__ import annotations

import gc
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .neighbours import QUIET, Neighbours

Call = Callable[[], object]

WAKE_UP_US = 10_000  # calls shorter than this get one untimed call first: waking the threads would show in them


@dataclass(frozen=True)
class Pace:
    """How long to measure. A slot is the turn of one contestant within a round."""

    rounds: int = 10
    slot_s: float = 0.05
    pause_s: float = 0.05  # idle workers of other libraries spin for tens of milliseconds after their last call
    slow_s: float = 1.0  # a contestant with calls slower than this takes part in `slow_rounds` rounds only
    slow_rounds: int = 3
    quiet: float = QUIET  # a round in which others used more than this share of the CPUs is measured again …
    repeats: int = 10  # … but no more than so many of a case; after that it counts, and is reported as disturbed


@dataclass(frozen=True)
class Timing:
    """Times of one contestant in µs; `rounds_us` holds the median of each of its turns, in order."""

    median_us: float
    p25_us: float
    p75_us: float
    min_us: float
    max_us: float
    calls: int
    rounds_us: tuple[float, ...]
    disturbed: int = 0  # rounds during which others were busy

    @classmethod
    def of(cls, turns: Sequence[Sequence[float]], disturbed: int = 0) -> Timing:
        """Summarise the turns of one contestant, each a list of times in µs."""
        every = sorted(itertools.chain.from_iterable(turns))
        p25, median, p75 = statistics.quantiles(every, n=4, method="inclusive") if len(every) > 1 else every * 3
        return cls(median, p25, p75, every[0], every[-1], len(every), tuple(statistics.median(t) for t in turns), disturbed)

    def times_faster_than(self, other: Timing) -> float:
        """Median over the rounds of other/self: both sides of each ratio were measured within the same second."""
        return statistics.median(b / a for a, b in zip(self.rounds_us, other.rounds_us, strict=False))


class Rotation:
    """The calls of one contestant, one per copy of its weights, taken in turn for ever."""

    def __init__(self, calls: Sequence[Call]) -> None:
        self._calls = list(calls)
        self._next = itertools.cycle(self._calls)

    def time_us(self) -> float:
        """Time one call on the next copy."""
        call = next(self._next)
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1000

    def warm_up(self, pace: Pace) -> tuple[int, int]:
        """Call the copies that will be timed once each, and return how long to measure: (rounds, calls per round).

        Libraries pack weights or compile on the first call with a new M, so each copy needs one.
        """
        self.time_us()
        estimate_us = self.time_us()
        rounds = pace.rounds if estimate_us < pace.slow_s * 1e6 else min(pace.slow_rounds, pace.rounds)
        calls = max(1, round(pace.slot_s * 1e6 / estimate_us))
        for call in self._calls[: rounds * (calls + 1)]:
            call()
        self._next = itertools.cycle(self._calls)
        return rounds, calls

    def turn(self, calls: int, pace: Pace) -> list[float]:
        """Wait for others' threads to sleep, then time `calls` calls (µs each)."""
        time.sleep(pace.pause_s)
        first = self.time_us()
        if first > WAKE_UP_US:
            return [first, *(self.time_us() for _ in range(calls - 1))]
        return [self.time_us() for _ in range(calls)]


def interleave(rotations: Mapping[str, Rotation], pace: Pace) -> dict[str, Timing | Exception]:
    """Time all contestants in turn, round after round, so that a noisy neighbour disturbs all alike.

    Every other round goes backwards (A B C, C B A, …), so that nobody always has the same predecessor.
    A contestant that raises is out, with its exception as its result; the others go on.
    """
    plans, failed = _warm_up(rotations, pace)
    turns: dict[str, list[list[float]]] = {name: [] for name in rotations}
    kept = disturbed = repeated = 0
    gc.disable()
    try:
        while present := [name for name, (rounds, _) in plans.items() if kept < rounds and name not in failed]:
            neighbours = Neighbours()
            measured = _round(rotations, present if kept % 2 == 0 else present[::-1], plans, pace, failed)
            busy = (neighbours.share() or 0.0) > pace.quiet
            if busy and repeated < pace.repeats:
                repeated += 1
                continue
            kept, disturbed = kept + 1, disturbed + busy
            for name, times in measured.items():
                turns[name].append(times)
    finally:
        gc.enable()
    return {name: failed.get(name) or Timing.of(turns[name], disturbed) for name in rotations}


def _warm_up(rotations: Mapping[str, Rotation], pace: Pace) -> tuple[dict[str, tuple[int, int]], dict[str, Exception]]:
    """Warm everybody up: (rounds, calls per round) of those that can, the exceptions of the others."""
    plans: dict[str, tuple[int, int]] = {}
    failed: dict[str, Exception] = {}
    for name, rotation in rotations.items():
        try:
            plans[name] = rotation.warm_up(pace)
        except Exception as error:  # any error of a foreign library is a finding, not a reason to stop
            failed[name] = error
    return plans, failed


def _round(
    rotations: Mapping[str, Rotation], order: Sequence[str], plans: Mapping[str, tuple[int, int]], pace: Pace, failed: dict[str, Exception]
) -> dict[str, list[float]]:
    """Give everybody in `order` one turn; who raises goes into `failed`."""
    measured: dict[str, list[float]] = {}
    for name in order:
        try:
            measured[name] = rotations[name].turn(plans[name][1], pace)
        except Exception as error:
            failed[name] = error
    return measured
