"""Measure contestants on one layer shape: prepare, check, copy, then time at every M."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from ..base import Contestant
from ..run import Entrant, Result, Say, enter, first_line, result_of
from ..shapes import LayerShape
from ..timing import Pace, Timing
from .device import Gpu
from .machine import Limits
from .timing import calls_of, inputs_by_dtype, rotation_bytes, time_eager, time_graphs


@dataclass(frozen=True)
class GpuResult(Result):
    """`timing` is of calls within a graph, `eager_us` of a call from Python, launches included.

    over_cublas, over_peer: how many times faster than the fastest of torch's contestants, and than the fastest other peer of the same
    arithmetic, within graphs.
    """

    eager_us: float | None = None
    copies: int = 0
    graph_calls: int = 0
    over_cublas: float | None = None
    over_peer: float | None = None


@dataclass
class Budget:
    """Minutes that measuring may take; what has begun by then is brought to its end."""

    minutes: float
    clock: Callable[[], float] = time.monotonic
    start: float = field(init=False)

    def __post_init__(self) -> None:
        self.start = self.clock()

    def spent_s(self) -> float:
        return self.clock() - self.start

    def why_stop(self) -> str:
        """Why nothing new may begin; "" while there is time."""
        return f"the time budget of {self.minutes:g} minutes was used up" if self.spent_s() >= 60 * self.minutes else ""


@dataclass
class ShapeReport:
    """What came of one shape. `unmeasured`: reasons by M; `prepare_s`: seconds for preparing, checking and copying."""

    results: list[GpuResult] = field(default_factory=list)
    unmeasured: dict[int, str] = field(default_factory=dict)
    prepare_s: dict[str, float] = field(default_factory=dict)


class Stopped(Exception):
    """Nothing more may be measured; the message says why."""


@dataclass
class Bench:
    """What all shapes share."""

    gpu: Gpu
    pace: Pace
    budget: Budget
    limits: Limits | None = None
    threads: int = 1
    say: Say = lambda _: None

    def go_on(self) -> None:
        """Raises: Stopped, when the GPU is lost or the time is up."""
        if reason := (f"the GPU stopped working ({self.gpu.lost})" if self.gpu.lost else self.budget.why_stop()):
            raise Stopped(reason)

    def measure_shape(self, shape: LayerShape, contestants: Sequence[Contestant], ms: Sequence[int]) -> ShapeReport:
        """Measure every contestant at every M. What cannot be measured has a reason; nothing is raised."""
        report = ShapeReport()
        try:
            entrants, xs = self._prepare(shape, contestants, ms, report)
            for m, x in xs.items():
                self.go_on()
                self.say(f"{shape.name}: timing M={m}")
                report.results += self._measure_case(shape, m, x, entrants)
        except Stopped as stop:
            reason = str(stop)
        except Exception as error:  # of ours, such as no memory for the weight
            self.gpu.examine(shape.name, first_line(error))
            reason = first_line(error)
        else:
            return report
        done = {r.m for r in report.results}
        report.unmeasured = {m: reason for m in ms if m not in done}
        return report

    def _prepare(
        self, shape: LayerShape, contestants: Sequence[Contestant], ms: Sequence[int], report: ShapeReport
    ) -> tuple[list[Entrant], dict[int, Tensor]]:
        self.go_on()
        self.gpu.free(collect=True)
        weight, xs = data(shape, ms, self.gpu.device)
        entrants = []
        for contestant in contestants:
            self.go_on()
            self.say(f"{shape.name}: preparing {contestant.name}")
            start = time.monotonic()
            entrants.append(self._enter(contestant, weight, xs))
            report.prepare_s[contestant.name] = time.monotonic() - start
        return entrants, xs

    def _enter(self, contestant: Contestant, weight: Tensor, xs: dict[int, Tensor]) -> Entrant:
        """Prepare, check at every M, copy; and see to it that an error is blamed on the contestant that made it."""
        entrant = enter(contestant, weight, xs, self.threads, rotation_bytes(self.gpu.properties()["l2_bytes"]))
        try:
            self.gpu.synchronize()
        except Exception as error:
            entrant.unprepared = entrant.unprepared or first_line(error)
        if what := entrant.unprepared or next(iter(entrant.faults.values()), ""):
            self.gpu.examine(contestant.name, what)
            self.gpu.free(collect=True)
        return entrant

    def _measure_case(self, shape: LayerShape, m: int, x: Tensor, entrants: list[Entrant]) -> list[GpuResult]:
        """Time one M: graphs in turn, then eager calls."""
        able = [e for e in entrants if not e.unprepared and m not in e.faults]
        inputs = inputs_by_dtype(x, {e.contestant.dtype for e in able})
        calls = {e.contestant.name: calls_of(e.copies, inputs[e.contestant.dtype]) for e in able}
        timings, graph_calls = time_graphs(self.gpu, calls, self.pace)
        faults = {name: first_line(t) for name, t in timings.items() if isinstance(t, Exception)}
        good = {name: t for name, t in timings.items() if isinstance(t, Timing)}
        del timings  # exceptions hold the graphs that they came from
        eager = time_eager(self.gpu, calls, {name: t.median_us for name, t in good.items()})
        self.gpu.free(collect=bool(faults))
        for entrant in able:
            if reason := faults.get(entrant.contestant.name):
                entrant.faults[m] = reason
        results = []
        for entrant in entrants:
            result, name = result_of(shape, m, entrant, good), entrant.contestant.name
            more = {"eager_us": eager.get(name), "copies": len(entrant.copies), "graph_calls": graph_calls.get(name, 0)}
            results.append(with_limit(GpuResult(**asdict(result), **more), self.limits))
        return with_ratios(results)


def data(shape: LayerShape, ms: Iterable[int], device: torch.device) -> tuple[Tensor, dict[int, Tensor]]:
    """Gaussian weight [N, K] with rows of length about 1, and activations [M, K] for every M; float32, the same on every run."""
    generator = torch.Generator(device).manual_seed(0)
    weight = torch.randn(shape.n, shape.k, generator=generator, device=device).mul_(shape.k**-0.5)
    generator.manual_seed(1)
    return weight, {m: torch.randn(m, shape.k, generator=generator, device=device) for m in ms}


def with_limit(result: GpuResult, limits: Limits | None) -> GpuResult:
    """Add the least time that the GPU's limits allow, and the share of it that was reached."""
    if result.timing is None or limits is None:
        return result
    limit_us = limits.limit_us(result.traffic, 2 * result.m * result.n * result.k, result.arithmetic)
    return replace(result, limit_us=limit_us, share=limit_us / result.timing["median_us"])


def with_ratios(results: list[GpuResult]) -> list[GpuResult]:
    """Add how many times faster each result of one case is than the fastest of cuBLAS, and than the fastest other peer."""
    return [replace(r, over_cublas=_over_best(r, results, "torch"), over_peer=_over_best(r, results, "peer")) for r in results]


def _over_best(result: GpuResult, results: list[GpuResult], kind: str) -> float | None:
    """1.0 for the fastest of torch's own: it is what it is compared with. A peer is compared with the others of its arithmetic."""
    rivals = [r for r in results if r.kind == kind and r.timing]
    if kind == "peer":
        rivals = [r for r in rivals if r is not result and r.arithmetic == result.arithmetic]
    if result.timing is None or not rivals:
        return None
    best = min(rivals, key=lambda r: r.timing["median_us"])
    return 1.0 if best is result else result.times_over[best.contestant]
