"""Time contestants in turn: replays of CUDA graphs over rotating copies, and eager calls by the clock on the wall."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..base import CheckFailed
from ..check import rows_to_check
from ..timing import Pace, Rotation, Timing, interleave
from .device import Call, Gpu

LEAST_ROTATION_BYTES = 200_000_000
MOST_CALLS = 1000  # in a graph
PACE = Pace(rounds=8, slot_s=2e-3, pause_s=0, slow_s=0.05, slow_rounds=3, quiet=1.0)  # slot_s and slow_s: of one replay
REPLAYS = 2  # timed in a turn
EAGER_PACE = Pace(rounds=3, slot_s=20e-3, pause_s=0, quiet=1.0)
EAGER_CALLS = (3, 200)  # at least, at most
SAME = 1e-2  # NMSE between two runs of one layer: atomic sums in bf16 come in any order; work that is missing leaves NaN, or far more


def rotation_bytes(l2_bytes: int) -> int:
    """Copies have to fill so much: over 200 MB and over four times the L2 cache."""
    return max(LEAST_ROTATION_BYTES, 4 * l2_bytes) + 1


def plan_calls(copies: int, call_us: float, slot_s: float) -> int:
    """How many calls a graph gets: enough to last `slot_s`, at most MOST_CALLS, and every copy equally often.

    With part of a turn left over, the next replay would begin with copies that were read a moment ago.
    """
    turns = math.ceil(slot_s * 1e6 / max(call_us * copies, 1e-3))
    return copies * max(1, min(turns, MOST_CALLS // copies))


class Replays(Rotation):
    """The calls of one contestant as a CUDA graph; a turn is some replays of it."""

    def __init__(self, gpu: Gpu, who: str, calls: Sequence[Call]) -> None:
        super().__init__(calls)
        self._gpu, self._who = gpu, who
        self.calls = 0  # in the graph

    def warm_up(self, pace: Pace) -> tuple[int, int]:
        """Call every copy, capture, compare the graph's output with an eager one, and return (rounds, replays in a turn)."""
        with self._gpu.watch(self._who):
            self._gpu.warm_up([self._calls[0], *self._calls])  # some libraries settle on the second call only
            self._capture(len(self._calls))
            call_us = self._gpu.times_us([self._graph.replay] * 2)[1] / self.calls
            if (calls := plan_calls(len(self._calls), call_us, pace.slot_s)) > self.calls:
                self._capture(calls)
            check_graph(self._gpu, self._graph.replay, self._graph.output, self._calls[-1]())
        slow = call_us * self.calls > pace.slow_s * 1e6
        return (min(pace.slow_rounds, pace.rounds), 1) if slow else (pace.rounds, REPLAYS)

    def _capture(self, calls: int) -> None:
        """The first graph lives until the second one is there: memory that no graph uses any more could not be shared again."""
        self._graph, self.calls = self._gpu.capture(self._calls * (calls // len(self._calls))), calls

    def turn(self, calls: int, pace: Pace) -> list[float]:
        """µs per call of each of `calls` replays; one more before them fills the queue and is not counted."""
        with self._gpu.watch(self._who):
            return [us / self.calls for us in self._gpu.times_us([self._graph.replay] * (1 + calls))[1:]]


def check_graph(gpu: Gpu, replay: Call, output: Tensor, expected: Tensor) -> None:
    """Compare what a replay leaves in `output` with an eager result. Raises: CheckFailed."""
    output.fill_(float("nan"))
    replay()
    gpu.synchronize()
    rows = rows_to_check(len(expected))
    got, want = output[rows].float(), expected[rows].float()
    error = ((got - want).square().mean() / want.square().mean()).item()
    if not error <= SAME:  # NaN included
        raise CheckFailed(f"the graph's output differs from the eager one (NMSE {error:.2g}): not all of its work was captured")


class Burst(Rotation):
    """Eager calls back to back; a turn is one burst of `count` calls and one synchronisation."""

    def __init__(self, gpu: Gpu, who: str, calls: Sequence[Call], count: int) -> None:
        super().__init__(calls)
        self._gpu, self._who, self._count = gpu, who, count

    def warm_up(self, pace: Pace) -> tuple[int, int]:
        """Let the allocator find memory for the outputs of this stream."""
        with self._gpu.watch(self._who):
            for _ in range(2):
                next(self._next)()
        return pace.rounds, self._count

    def turn(self, calls: int, pace: Pace) -> list[float]:
        """µs per call of the burst, by the clock on the wall."""
        with self._gpu.watch(self._who):
            self._gpu.synchronize()
            start = time.perf_counter_ns()
            for _ in range(calls):
                next(self._next)()
            self._gpu.synchronize()
            return [(time.perf_counter_ns() - start) / 1000 / calls]


def time_graphs(gpu: Gpu, calls: Mapping[str, Sequence[Call]], pace: Pace) -> tuple[dict[str, Timing | Exception], dict[str, int]]:
    """Time all contestants' graphs in turn: their timings or exceptions, and the calls in each graph."""
    replays = {name: Replays(gpu, name, each) for name, each in calls.items()}
    return interleave(replays, pace), {name: r.calls for name, r in replays.items()}


def time_eager(gpu: Gpu, calls: Mapping[str, Sequence[Call]], graph_us: Mapping[str, float], pace: Pace = EAGER_PACE) -> dict[str, float]:
    """Median µs of an eager call of each contestant in `graph_us`, its time within a graph; who raises is left out."""
    bursts = {name: Burst(gpu, name, calls[name], burst_calls(us, pace.slot_s)) for name, us in graph_us.items()}
    return {name: t.median_us for name, t in interleave(bursts, pace).items() if isinstance(t, Timing)}


def burst_calls(call_us: float, slot_s: float) -> int:
    """How many eager calls make a burst."""
    least, most = EAGER_CALLS
    return min(most, max(least, round(slot_s * 1e6 / call_us)))


def calls_of(copies: Sequence[Call], x: Tensor) -> list[Call]:
    """One call per copy of a layer, all on the same activations."""
    return [lambda copy=copy: copy(x) for copy in copies]


def inputs_by_dtype(x: Tensor, dtypes: set[torch.dtype]) -> dict[torch.dtype, Tensor]:
    """Activations once per dtype: contestants of one dtype read the same."""
    return {dtype: x.to(dtype) for dtype in dtypes}
