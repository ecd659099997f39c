"""The GPU harness, with a fake in place of CUDA: plans, turns, budget, a GPU that breaks, and what is made of a record."""

from __future__ import annotations

import gc
import statistics
import time
from contextlib import contextmanager
from dataclasses import asdict, replace

import pytest
import torch

from .base import CheckFailed
from .check import check
from .conftest import contestant, raising
from .gpu import command, machine, ours, peers, record, report
from .gpu.device import DeviceLost, Gpu, Graph
from .gpu.machine import Limits
from .gpu.run import Bench, Budget, GpuResult, with_limit, with_ratios
from .gpu.shapes import class_of, int4_bytes, parse_shapes
from .gpu.timing import MOST_CALLS, PACE, Burst, Replays, burst_calls, check_graph, plan_calls, rotation_bytes, time_eager, time_graphs
from .peers import select
from .shapes import LayerShape

TINY = LayerShape(64, 128, "tiny o")
LIMITS = Limits(copy_gbs=3000, bf16_tflops=800, int8_tops=1600)
FAST = replace(PACE, rounds=4, slot_s=1e-6)
without_cuda = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")


class FakeGpu(Gpu):
    """Runs on the CPU; `log` has what was called, `broken` makes every later use fail as after an illegal address."""

    device = torch.device("cpu")

    def __init__(self, l2_bytes: int = 1000) -> None:
        self.log, self.broken, self.l2_bytes = [], False, l2_bytes

    def properties(self) -> dict:
        sizes = {"l2_bytes": self.l2_bytes, "memory_bytes": 80 << 30}
        return {"name": "NVIDIA Fake 80GB", "sm": 90, "sms": 132, "uuid": "some-uuid"} | sizes

    def synchronize(self) -> None:
        if self.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    probe = synchronize

    def free(self, collect: bool = False) -> None:
        self.log.append("free")

    def warm_up(self, calls) -> None:
        for call in calls:
            call()
        self.synchronize()

    def capture(self, calls) -> Graph:
        self.log.append(f"capture {len(calls)}")
        output = [call() for call in calls][-1].clone()
        return Graph(lambda: output.copy_(calls[-1]()), output)

    def times_us(self, calls) -> list[float]:
        self.synchronize()
        return [self._time_us(call) for call in calls]

    @staticmethod
    def _time_us(call) -> float:
        start = time.perf_counter_ns()
        call()
        return (time.perf_counter_ns() - start) / 1000


def breaking(gpu: FakeGpu, at: int = 1):
    """A layer that breaks the GPU in its `at`-th call."""
    calls = []

    def spoil(y):
        calls.append(1)
        gpu.broken = gpu.broken or len(calls) >= at
        gpu.synchronize()
        return y

    return spoil


def bench(gpu: FakeGpu, minutes: float = 1.0, **more) -> Bench:
    return Bench(gpu, FAST, Budget(minutes), LIMITS, **more)


@pytest.fixture(autouse=True)
def few_bytes(monkeypatch):
    """Four copies of a TINY bf16 layer, not the thousands that 200 MB would take."""
    monkeypatch.setattr("benchmarks.gpu.timing.LEAST_ROTATION_BYTES", 3 * TINY.n * TINY.k * 2)


# -- plans -------------------------------------------------------------------------------------------------------------------------


def test_shapes():
    assert [s.name for s in parse_shapes("8b, 4096x4096,64x32")] == ["6144x4096", "4096x4096", "28672x4096", "4096x14336", "64x32"]
    assert [s.label for s in parse_shapes("70b")] == ["70b qkv", "70b o", "70b gate_up", "70b down"]
    assert parse_shapes("llama3-8b")[1].name == "1024x4096"
    with pytest.raises(ValueError, match=r"unknown shape '9b'.*, 8b, 70b"):
        parse_shapes("9b")


def test_classes_are_of_int4_bytes():
    assert int4_bytes(4096, 4096) == 4096 * 4096 * 33 // 64
    assert [class_of(s.n, s.k) for s in parse_shapes("8b")] == ["10–30 MB", "<10 MB", "≥30 MB", "≥30 MB"]


def test_copies_exceed_four_times_the_cache():
    assert rotation_bytes(50 << 20) == 4 * (50 << 20) + 1
    assert rotation_bytes(0) > 3 * TINY.n * TINY.k * 2


@pytest.mark.parametrize("copies, call_us, calls", [(24, 3.0, 672), (24, 1e-9, 984), (1, 5000.0, 1), (7, 300.0, 7), (600, 1.0, 600)])
def test_a_graph_has_every_copy_equally_often(copies, call_us, calls):
    planned = plan_calls(copies, call_us, 2e-3)
    assert planned == calls and planned % copies == 0 and (planned <= MOST_CALLS)


def test_bursts_are_shorter_for_slow_calls():
    assert [burst_calls(us, 20e-3) for us in (1.0, 200.0, 1e6)] == [200, 100, 3]


# -- turns -------------------------------------------------------------------------------------------------------------------------


def copies(name: str, order: list[str], count: int = 2, spoil=lambda y: y):
    def call(i):
        order.append(f"{name}{i}")
        return spoil(torch.full((2, 3), 7.0))

    return [lambda i=i: call(i) for i in range(count)]


def test_a_replay_comes_before_those_that_count():
    gpu, order = FakeGpu(), []
    replays = Replays(gpu, "a", copies("a", order))
    assert replays.warm_up(FAST) == (4, 2)
    assert order[:3] == ["a0", "a0", "a1"]  # every copy before the capture
    assert replays.calls == 2 and gpu.log[0] == "capture 2"
    order.clear()
    assert len(replays.turn(2, FAST)) == 2
    assert len(order) == 3


def test_short_calls_get_a_longer_graph(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr(gpu, "times_us", lambda calls: [20.0] * len(calls))
    replays = Replays(gpu, "a", copies("a", []))
    assert replays.warm_up(replace(FAST, slot_s=2e-3)) == (4, 2)
    assert gpu.log == ["capture 2", "capture 200"]
    assert replays.turn(2, FAST) == [0.1, 0.1]
    assert replays.warm_up(replace(FAST, slow_s=1e-6, slow_rounds=3)) == (3, 1)  # slow: fewer rounds


def test_contestants_take_turns(monkeypatch):
    gpu, turns = FakeGpu(), []
    original = Replays.turn
    monkeypatch.setattr(Replays, "turn", lambda self, calls, pace: turns.append(self._who) or original(self, calls, pace))
    timings, calls = time_graphs(gpu, {name: copies(name, []) for name in "abc"}, FAST)
    assert "".join(turns) == "abccbaabccba"
    assert set(calls) == set(timings) == set("abc")
    assert all(len(t.rounds_us) == 4 and t.calls == 8 and t.p25_us <= t.median_us <= t.p75_us for t in timings.values())


def test_a_contestant_that_raises_is_out():
    gpu = FakeGpu()
    calls = {"good": copies("good", []), "bad": [lambda: 1 / 0]}
    timings, _ = time_graphs(gpu, calls, FAST)
    assert isinstance(timings["bad"], ZeroDivisionError) and timings["good"].median_us > 0 and not gpu.lost
    assert set(time_eager(gpu, calls, {"good": 1000.0, "bad": 1000.0})) == {"good"}


def test_a_timing_is_a_median_over_all_replays():
    gpu = FakeGpu()
    timings, _ = time_graphs(gpu, {"a": copies("a", [])}, FAST)
    t = asdict(timings["a"])
    assert t["min_us"] <= t["median_us"] <= t["max_us"] and statistics.median(t["rounds_us"]) > 0


def test_eager_time_is_per_call(monkeypatch):
    now = [0]  # ns, of a clock that moves with the calls alone
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    burst = Burst(FakeGpu(), "a", [lambda: now.append(now.pop() + 1_000_000)], 5)
    assert burst.warm_up(FAST) == (4, 5)
    assert burst.turn(5, FAST) == [1000.0]


def test_a_graph_that_misses_work_is_found():
    gpu, expected = FakeGpu(), torch.ones(2, 3)
    output = torch.ones(2, 3)
    check_graph(gpu, lambda: output.fill_(1), output, expected)
    for replay in (lambda: None, lambda: output.fill_(2)):
        with pytest.raises(CheckFailed, match="not all of its work was captured"):
            check_graph(gpu, replay, output, expected)


# -- a GPU that breaks, and time that runs out -----------------------------------------------------------------------------------------


def test_an_ordinary_error_does_not_lose_the_gpu():
    gpu = FakeGpu()
    with pytest.raises(ValueError), gpu.watch("a"):
        raise ValueError("x")
    assert not gpu.lost


def test_full_memory_does_not_lose_the_gpu(monkeypatch):
    gpu = FakeGpu()

    def full():
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(gpu, "probe", full)
    gpu.examine("a", "out of memory")
    assert not gpu.lost


def test_a_lost_gpu_is_blamed_on_who_was_at_work():
    gpu = FakeGpu()
    spoil = breaking(gpu, at=12)
    timings, _ = time_graphs(gpu, {"a": copies("a", []), "bad": copies("bad", [], spoil=spoil), "c": copies("c", [])}, FAST)
    assert gpu.lost.startswith("bad: RuntimeError: CUDA error: an illegal memory access")
    assert all(isinstance(t, Exception) for t in timings.values())
    assert any(isinstance(t, DeviceLost) for t in timings.values())
    with pytest.raises(DeviceLost), gpu.watch("later"):
        raise AssertionError("must not run")


def test_a_shape_with_good_wrong_and_failing_contestants():
    gpu = FakeGpu()
    those = [
        contestant("ours"),
        contestant("cublas", "torch"),
        contestant("peer", "peer"),
        contestant("wrong", spoil=lambda y: y * 1.05),
        contestant("fails", "peer", prepare=raising(RuntimeError("no such kernel\nand more"))),
    ]
    said = []
    made = bench(gpu, say=said.append).measure_shape(TINY, those, [1, 4])
    assert not made.unmeasured and set(made.prepare_s) == {c.name for c in those}
    rows = {(r.contestant, r.m): r for r in made.results}
    ours_1 = rows["ours", 1]
    assert ours_1.ok and ours_1.copies == 4 and ours_1.graph_calls == 4 and ours_1.eager_us > 0
    assert ours_1.over_cublas == ours_1.times_over["cublas"] and ours_1.over_peer == ours_1.times_over["peer"]
    assert rows["cublas", 1].over_cublas == 1 and rows["peer", 1].over_peer is None
    assert ours_1.share == pytest.approx(ours_1.limit_us / ours_1.timing["median_us"]) and ours_1.nmse < 1e-4
    assert not rows["wrong", 4].ok and rows["wrong", 4].timing is None and "CheckFailed" in rows["wrong", 4].reason
    assert rows["fails", 1].reason == "RuntimeError: no such kernel"
    assert said[0] == "64x128: preparing ours" and said[-1] == "64x128: timing M=4"


@pytest.mark.parametrize("at, rows", [(1, 0), (20, 2)])
def test_what_was_measured_before_the_gpu_broke_is_kept(at, rows):
    gpu = FakeGpu()
    those = [contestant("good"), contestant("bad", "peer", spoil=breaking(gpu, at))]
    b = bench(gpu)
    made = b.measure_shape(TINY, those, [1, 4, 8])
    assert gpu.lost.startswith("bad: ") and len(made.results) == rows
    reason = next(iter(made.unmeasured.values()))
    assert reason.startswith("the GPU stopped working (bad: ") and len(made.unmeasured) == 3 - rows // 2
    assert b.measure_shape(TINY, those, [1]).unmeasured == {1: reason}


def test_an_error_of_the_harness_is_a_reason(monkeypatch):
    monkeypatch.setattr("benchmarks.gpu.run.data", lambda *_: 1 / 0)
    made = bench(FakeGpu()).measure_shape(TINY, [contestant("a")], [1, 2])
    assert made.unmeasured == dict.fromkeys([1, 2], "ZeroDivisionError: division by zero")


def test_nothing_new_begins_when_the_time_is_up():
    now = iter(range(0, 10_000, 10))
    budget = Budget(1, clock=lambda: next(now))  # every look at the clock takes ten seconds
    made = Bench(FakeGpu(), FAST, budget, LIMITS).measure_shape(TINY, [contestant("a")], [1, 2, 4, 8, 16])
    assert {r.m for r in made.results} == {1, 2, 4}
    assert made.unmeasured == dict.fromkeys([8, 16], "the time budget of 1 minutes was used up")


class FakeCudaGraph:
    """`fails`: what raises, the end of a capture included, as torch's does after an error within it."""

    def __init__(self, fails: bool) -> None:
        self.log, self.fails = [], fails

    def capture_begin(self, pool, capture_error_mode) -> None:
        self.log.append(("begin", pool, capture_error_mode))

    def capture_end(self) -> None:
        self.log.append("end")
        if self.fails:
            raise RuntimeError("operation failed due to a previous error during capture")

    def replay(self) -> None:
        self.log.append("replay")


@pytest.fixture
def cuda(monkeypatch) -> dict:
    """A Gpu with CUDA's part of torch replaced; `graph` is what the next capture captures into."""
    found = {"stream": None, "streams": 0, "pools": 0, "returned": []}

    @contextmanager
    def stream(s):
        found["stream"], before = s, found["stream"]
        try:
            yield
        finally:
            found["stream"] = before

    def fresh(kind):
        found[kind] += 1
        return f"{kind}{found[kind]}"

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda: fresh("streams"))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: fresh("pools"))
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: found["graph"])
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, lambda device, pool, name=name: found["returned"].append((name, pool)), raising=False)
    return found | {"found": found, "gpu": Gpu()}


def test_a_capture(cuda):
    gpu, graph, streams = cuda["gpu"], FakeCudaGraph(fails=False), []
    cuda["found"]["graph"] = graph
    calls = [lambda i=i: streams.append(cuda["found"]["stream"]) or torch.tensor(float(i)) for i in range(3)]
    made = gpu.capture(calls)
    made.replay()
    assert graph.log == [("begin", "pools1", "thread_local"), "end", "replay"] and made.output == 2
    assert streams == ["streams1"] * 3 and cuda["found"]["stream"] is None and gc.isenabled() and not cuda["found"]["returned"]


def test_after_a_capture_that_failed_the_next_one_works(cuda):
    gpu, found = cuda["gpu"], cuda["found"]
    found["graph"] = graph = FakeCudaGraph(fails=True)
    with pytest.raises(ZeroDivisionError):  # the reason, not what the end of the capture says
        gpu.capture([lambda: 1 / 0])
    assert graph.log == [("begin", "pools1", "thread_local"), "end"] and found["stream"] is None and gc.isenabled()
    assert found["returned"] == [("_cuda_endAllocateToPool", "pools1"), ("_cuda_releasePool", "pools1")]
    found["graph"] = graph = FakeCudaGraph(fails=False)
    gpu.capture([lambda: torch.ones(1)])
    assert graph.log[0] == ("begin", "pools2", "thread_local")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu():
    """Real graphs: one contestant that cannot be captured among others that can, then a whole shape."""
    gpu = Gpu()
    x = torch.randn(16, 1024, device=gpu.device)
    weights = [torch.randn(1024, 1024, device=gpu.device) for _ in range(3)]
    calls = {"bad": [lambda: x * x.sum().item()], "good": [lambda w=w: x @ w for w in weights]}
    with torch.inference_mode():
        for _ in range(2):
            timings, sizes = time_graphs(gpu, calls, replace(FAST, slot_s=1e-3))
            assert isinstance(timings["bad"], RuntimeError) and timings["good"].median_us > 1 and not gpu.lost
            assert sizes["good"] % 3 == 0 and time_eager(gpu, calls, {"good": 10.0})["good"] > 1
            gpu.free(collect=True)
        those = [*peers.TORCH, *ours.contestants(["int4"], ["float"], "bfloat16")]
        made = bench(gpu).measure_shape(LayerShape(4096, 4096), those, [1, 64])
    assert not gpu.lost and not made.unmeasured
    assert {r.contestant for r in made.results if r.ok and r.m == 64} >= {"torch F.linear bf16", "qkernels int4 float"}


# -- limits and the machine ------------------------------------------------------------------------------------------------------------


def test_limits():
    assert LIMITS.limit_us(3_000_000, 1, "bf16") == pytest.approx(1.0)
    assert LIMITS.limit_us(1, 800_000_000, "bf16") == pytest.approx(1.0)
    assert LIMITS.limit_us(1, 800_000_000, "int8") == pytest.approx(0.5)
    assert replace(LIMITS, int8_tops=None).peak("int8") == 800


def test_limits_are_the_best_of_some_tries(monkeypatch):
    monkeypatch.setattr(machine, "COPY_BYTES", 1 << 10)
    monkeypatch.setattr(machine, "PEAK", 32)
    gpu = FakeGpu()
    monkeypatch.setattr(gpu, "times_us", lambda calls: [call() is None or 100.0 - i for i, call in enumerate(calls)])
    found = machine.measure_limits(gpu)
    best_us = 100.0 - (3 + machine.TRIES - 1)
    assert found.copy_gbs == pytest.approx(2 * 1024 / best_us / 1e3)
    assert found.bf16_tflops == pytest.approx(2 * 32**3 / best_us / 1e6) == found.int8_tops
    monkeypatch.setattr(torch, "_int_mm", lambda *_: 1 / 0)
    assert machine.measure_limits(gpu).note == "int8 peak: ZeroDivisionError: division by zero" and not gpu.lost


def test_nvidia_smi_is_read_by_uuid():
    lines = [f"GPU-{name}, 580.1, {clock}, 2619, 1980, 71.2, 700.00, 33" for name, clock in (("a", 345), ("b", 1980))]
    found = machine.parse_snapshot("\n".join(lines), "b")
    assert found["clocks.sm"] == "1980" and found["driver_version"] == "580.1" and "uuid" not in found
    assert machine.parse_snapshot("\n".join(lines), "c")["clocks.sm"] == "345"
    assert "note" in machine.parse_snapshot("", "a")


def test_a_machine_without_nvidia_smi_says_so(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert "nvidia-smi" in machine.snapshot()["note"]


def test_names():
    assert machine.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert command.name_of(FakeGpu(), smoke=True) == "nvidia-fake-80gb-smoke"
    assert record.without_out(["gpu", "--out", "/x", "--m", "1", "--out=/y"]) == ["gpu", "--m", "1"]


# -- contestants -----------------------------------------------------------------------------------------------------------------------


def test_a_format_may_name_its_arithmetic_and_its_kernel():
    """`--format int4:float:<kernel>`: two kernels side by side in one table."""
    asked = ours.contestants(["int4:float", "int8", "int4:float:reference"], ["float", "int8"], "bfloat16")
    names = ["qkernels int4 float", "qkernels int8 float", "qkernels int8 int8", "qkernels int4 float reference"]
    assert [entry.name for entry in asked] == names
    weight = torch.randn(64, 128)
    prepared = asked[-1].prepare(weight, 1)
    assert prepared.kernel == prepared.make().kernel == "reference" != asked[0].prepare(weight, 1).kernel


def test_our_copies_share_no_memory():
    with torch.inference_mode():
        (entry,) = ours.contestants(["int4"], ["float"], "bfloat16")
        prepared = entry.prepare(torch.randn(64, 128), 1)
        first, second = prepared.make(), prepared.make()
        pointers = [{p.untyped_storage().data_ptr() for p in layer.parameters()} for layer in (first, second)]
        assert not pointers[0] & pointers[1] and len(pointers[0]) == len(list(first.parameters()))
        x = torch.randn(3, 128).bfloat16()
        assert check(prepared, "bf16", x, second(x)).nmse < 1e-4


def test_select_peers():
    known = [contestant("marlin", "peer"), replace(contestant("HQQ", "peer"), package="hqq_aten")]
    assert select("all", known) == known and select("none", known) == []
    assert select("hqq_", known) == known[1:]
    with pytest.raises(ValueError, match="no peer matches 'cpu'; known: marlin, HQQ"):
        select("cpu", known)


def test_ratios_are_to_the_fastest_of_a_kind():
    def row(name, kind, us):
        over = {other: t / us for other, t in times.items()}
        timing = {"median_us": us, "rounds_us": (us,)}
        return GpuResult(name, kind, "w", "1x1", 1, 1, 1, ok=True, timing=timing, times_over=over, traffic=6000, arithmetic="bf16")

    times = {"q": 1.0, "mm": 4.0, "mv": 3.0, "p1": 2.0, "p2": 1.5}
    kinds = {"q": "qkernels", "mm": "torch", "mv": "torch", "p1": "peer", "p2": "peer"}
    rows = {r.contestant: r for r in with_ratios([row(name, kinds[name], us) for name, us in times.items()])}
    assert (rows["q"].over_cublas, rows["q"].over_peer) == (3.0, 1.5)
    assert (rows["mv"].over_cublas, rows["mm"].over_cublas) == (1.0, 0.75)
    assert (rows["p1"].over_peer, rows["p2"].over_peer) == (0.75, 2.0 / 1.5)
    assert with_limit(rows["p1"], LIMITS).share == pytest.approx(1e-3)
    assert with_ratios([row("q", "qkernels", 1.0)])[0].over_cublas is None
    eight = [rows["q"], replace(rows["p1"], arithmetic="int8")]
    assert with_ratios(eight)[0].over_peer is None
    good = [asdict(r) for r in (rows["q"], replace(rows["p1"], arithmetic="int8"), rows["p2"])]
    assert report.summarize({"results": good})[0].peers == (rows["p2"].over_cublas,)
    assert with_limit(rows["p1"], None).share is None
