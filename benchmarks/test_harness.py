"""The harness: turns, rotation, checks, peers."""

from __future__ import annotations

import signal
import subprocess
import time
from dataclasses import replace

import pytest
import torch

from qkernels.kernels.cpu import library, roofline

from . import goals, peers, report, timing
from .base import CheckFailed
from .check import check, rows_to_check
from .cliff import step_ratios
from .conftest import LIMITS, contestant
from .neighbours import Neighbours
from .overhead import held_bytes
from .peers.aten import linear
from .run import copies_of
from .shapes import parse_shapes
from .timing import Pace, Rotation, Timing, interleave


def test_shapes():
    shapes = parse_shapes("llama3-8b,4096x4096, 64x32")
    assert [s.name for s in shapes] == ["4096x4096", "1024x4096", "14336x4096", "4096x14336", "64x32"]
    assert shapes[-1].ops(3) == 2 * 3 * 64 * 32
    with pytest.raises(ValueError, match="unknown shape 'llama9'"):
        parse_shapes("llama9")


@pytest.mark.parametrize("faster", ["read", "read4", "fetch"])
def test_the_reader_takes_the_faster_way(faster, monkeypatch):
    monkeypatch.setattr(torch.ops.qkernels, "cpu_probe", lambda way, buffer, rounds: 2.0 if way == faster else 1.0, raising=False)
    assert roofline.reader(1 << 16)() == 2.0


def test_interleave_takes_turns_and_keeps_going():
    order = []
    calls = {name: Rotation([lambda name=name: order.append(name) or time.sleep(1e-4)]) for name in "ab"}
    calls["broken"] = Rotation([lambda: 1 / 0])
    found = interleave(calls, Pace(rounds=4, slot_s=1e-6, pause_s=0))
    assert isinstance(found["broken"], ZeroDivisionError)
    assert isinstance(found["a"], Timing) and len(found["a"].rounds_us) == 4
    warm_up = order.index("b")
    assert "".join(order[2 * warm_up :]) == "aabbbbaaaabbbbaa"  # one untimed call, one timed call, and back again


def test_a_slow_contestant_has_fewer_rounds():
    slow = Rotation([lambda: time.sleep(2e-3)])
    found = interleave({"slow": slow}, Pace(rounds=9, slot_s=1e-3, pause_s=0, slow_s=1e-3, slow_rounds=2))
    assert len(found["slow"].rounds_us) == 2


def test_rotation_uses_every_copy():
    seen = []
    rotation = Rotation([lambda i=i: seen.append(i) for i in range(3)])
    for _ in range(6):
        rotation.time_us()
    assert seen == [0, 1, 2, 0, 1, 2]


def test_copies_fill_the_caches_and_share_nothing():
    prepared = linear(torch.float32, torch.randn(8, 16))
    copies = copies_of(prepared, rotation=5 * prepared.nbytes)
    assert len(copies) == 5
    weights = {copy.__closure__[0].cell_contents.data_ptr() for copy in copies}
    assert len(weights) == 5


@pytest.mark.parametrize("m", [1, 96, 97, 512])
def test_rows_to_check(m):
    rows = rows_to_check(m).tolist()
    assert rows == sorted(set(rows)) and rows[0] == 0 and rows[-1] == m - 1 and len(rows) == min(m, 96)


def test_check_refuses():
    prepared = linear(torch.float32, torch.randn(8, 16))
    x = torch.randn(3, 16)
    good = prepared.make()(x)
    assert check(prepared, "fp32", x, good).nmse < 1e-12
    for bad in (good * 1.001, good[:, :4], torch.where(good == good.max(), torch.nan, good)):
        with pytest.raises(CheckFailed):
            check(prepared, "fp32", x, bad)


def test_limit():
    assert LIMITS.limit_us(nbytes=10_000, ops=10, arithmetic="int8") == pytest.approx(1.0)
    assert LIMITS.limit_us(nbytes=1, ops=1_000_000, arithmetic="int8") == pytest.approx(1.0)
    assert LIMITS.limit_us(nbytes=1, ops=1_000_000, arithmetic="bf16") == pytest.approx(10.0)  # no bf16 products: fp32's


def test_best_of_two_measurements():
    other = replace(LIMITS, read_gbs=12, fp32_gflops=90)
    assert LIMITS.best_of(other) == replace(LIMITS, read_gbs=12)


def test_wrong_results_have_no_speed(measured):
    by_name = {r["contestant"]: r for r in measured["results"]}
    assert by_name[goals.INT4]["ok"] and by_name[goals.INT4]["share"] > 0
    assert set(by_name[goals.INT4]["times_over"]) == {goals.TORCH}
    for name in ("wrong", "not finite", "peer that fails", "unsupported"):
        assert not by_name[name]["ok"] and by_name[name]["timing"] is None and by_name[name]["reason"]
    assert {r["contestant"] for r in report.reds(measured)} == {"wrong", "not finite"}


def test_reading_takes_its_turn(measured):
    good = next(r for r in measured["results"] if r["contestant"] == goals.INT4)
    if library.why_missing():
        pytest.skip(library.why_missing())
    assert good["read_gbs"] > 0 and 0 < good["read_share"] < 1
    limit_us = replace(LIMITS, read_gbs=good["read_gbs"]).limit_us(good["traffic"], 2 * good["m"] * good["n"] * good["k"], "bf16")
    assert good["limit_us"] == pytest.approx(limit_us)


def test_disturbed_rounds_are_repeated(monkeypatch):
    shares = iter([0.0, 0.9, 0.9, 0.9, None, 0.0])
    monkeypatch.setattr(timing.Neighbours, "share", lambda self: next(shares))
    calls = []
    found = interleave({"a": Rotation([lambda: calls.append(1)])}, Pace(rounds=4, slot_s=1e-9, pause_s=0, repeats=2))
    assert len(found["a"].rounds_us) == 4 and found["a"].disturbed == 1


def test_neighbours_do_not_include_ourselves():
    neighbours = Neighbours()
    end = time.perf_counter() + 0.6
    while time.perf_counter() < end:
        pass
    share = neighbours.share()
    assert share is None or 0 <= share <= 1


def test_step_ratios():
    assert step_ratios([(1, 1, 1), (2, 4, 2), (2, 4, 3)]) == [2, 1]


def test_held_bytes_counts_each_storage_once():
    module = torch.nn.Linear(4, 4, bias=False)
    module.cache = {"view": module.weight.detach()[:1], "other": (torch.zeros(8),)}
    assert held_bytes(module) == 4 * 4 * 4 + 8 * 4


def test_select_peers():
    assert peers.select("none") == [] and peers.select("all") == list(peers.OTHERS)
    assert {p.package for p in peers.select("zentorch, onnx")} == {"zentorch", "onnxruntime"}
    with pytest.raises(ValueError, match="no peer matches 'gpu'"):
        peers.select("gpu")


def test_peers_that_cannot_run_are_named_with_a_reason(monkeypatch):
    peer = contestant("nobody", "peer")
    assert peers.why_not(replace(peer, package="no_such_package"), 1) == "not installed (pip install no_such_package)"
    installed = replace(peer, package="torch")
    assert "StopIteration" in peers.why_not(installed, 1)  # the probe dies of the unknown name, the caller lives
    killed = subprocess.CompletedProcess([], -signal.SIGILL, "", "")
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: killed)
    assert peers.why_not(installed, 1) == "crashes on this CPU (SIGILL)"


@pytest.mark.parametrize("peer", peers.TORCH, ids=lambda p: p.name)
def test_torch_contestants_are_right(peer):
    weight = torch.randn(256, 512) * 512**-0.5
    with torch.inference_mode():
        prepared = peer.prepare(weight, 1)
        for m in (1, 17):
            x = torch.randn(m, 512).to(peer.dtype)
            check(prepared, peer.arithmetic, x, prepared.make()(x))
