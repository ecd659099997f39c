"""The comparison with ggml: its library, the derived tolerance, the command; what needs the library is skipped without it."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from . import __main__ as cli
from . import ggml as of_ggml
from . import goals, machine, peers, readme, report
from .base import CheckFailed, Prepared
from .check import check
from .conftest import FAST, LIMITS, contestant
from .peers import ggml
from .shapes import LayerShape

SHAPE = LayerShape(64, 256)


@pytest.fixture
def library():
    if reason := peers.why_not(ggml.CONTESTANTS[0], 1):
        pytest.skip(reason)


@pytest.mark.parametrize("type", ggml.TYPES)
def test_ggml_is_right_in_every_buffer(library, type):
    weight = torch.randn(SHAPE.n, SHAPE.k) * SHAPE.k**-0.5
    for buffer in ggml.buffer_types():
        try:
            prepared = ggml.contestant(type, buffer).prepare(weight, 1)
            layer = prepared.make()
        except ggml.UnsupportedError:
            continue
        for m in (1, 17):
            x = torch.randn(m, SHAPE.k)
            y = layer(x)
            assert check(prepared, "int8", x, y).nmse < 1e-3
            with pytest.raises(CheckFailed, match="where int8 activations may cost"):
                check(prepared, "int8", x, y * 1.1)
    assert ggml.contestant(type).prepare(weight, 1).kernel in ggml.buffer_types()


def test_both_are_given_the_same_bytes(library):
    weight = torch.randn(SHAPE.n, SHAPE.k)
    theirs, ours = (c.prepare(weight, 1) for c in (ggml.contestant("q4_k", "CPU"), of_ggml.ours("q4_k")))
    assert torch.equal(theirs.weight, ours.weight) and theirs.nbytes == ours.nbytes == SHAPE.n * 144


def test_a_refused_shape_is_skipped(library):
    with pytest.raises(ggml.UnsupportedError, match="CPU_REPACK does not take q4_0 3 x 32"):
        ggml.contestant("q4_0", "CPU_REPACK").prepare(torch.randn(3, 32), 1).make()


def test_without_the_library(monkeypatch):
    monkeypatch.setattr(ggml, "libraries", list)
    assert peers.why_not(ggml.CONTESTANTS[0], 1) == ggml.ABSENT
    assert {p.name for p in peers.select("llama")} == {"llama.cpp q4_0", "llama.cpp q8_0"}


def test_tolerance():
    weight, x = torch.randn(8, 64), torch.randn(3, 64)
    y = x @ weight.T
    ggml.assert_close(weight, 32, x, y)
    step = x.abs().view(3, 2, 32).amax(2) / 127
    worst = 0.5 * step @ weight.abs().view(8, 2, 32).sum(2).T
    ggml.assert_close(weight, 32, x, y + worst)  # every activation half a step off
    with pytest.raises(CheckFailed):
        ggml.assert_close(weight, 32, x, y + 1.3 * worst)


def rows(name: str, m: int, times_over: dict[str, float], **more) -> dict:
    fields = {"contestant": name, "weights": "q4_0", "shape": goals.SHAPE, "m": m, "ok": True, "timing": {"median_us": 100.0}}
    return fields | {"times_over": times_over, "kernel": "CPU", "read_share": 0.9} | more


def test_goals_and_tables():
    over = {"ggml q4_0 CPU": 3.0, "ggml q4_0 AMX": 1.5, goals.TORCH: 4.0}
    results = [rows("qkernels q4_0 int8", m, over) for m in (1, 512)]
    results += [rows("ggml q4_0 CPU", 512, {}), rows("ggml q4_0 AMX", 512, {}, kernel="AMX", timing={"median_us": 50.0})]
    results += [rows("qkernels int4_asym int8", 512, {goals.INT4: 0.8}, weights="int4_asym", read_share=1.2)]
    judged = {g["goal"]: (g["value"], g["met"]) for g in goals.judge_all({"results": results}, goals.GGML_GOALS)}
    assert judged["q4_0 M=1: share of the read bandwidth"] == ("90 %", True)
    assert judged["q4_0 M=512: over ggml"] == ("1.50 ×", False)  # over the fastest of its buffers
    assert judged["q4_1 M=512: over ggml"] == ("not measured", None)
    assert judged["int4 with zero points M=512: time over symmetric int4"] == ("1.25 ×", False)
    first, second = of_ggml.tables({"results": results})
    assert "| q4_0 | 90 % | 100, 1.50 ×, 4.00 × | 100, 1.50 ×, 4.00 × | AMX, 50 µs |" in first
    assert "| int4 with zero points | – | 1.25 × |" in second


def test_command(monkeypatch, tmp_path):
    wrong = contestant("qkernels q4_0 int8", spoil=lambda y: y * 2)
    monkeypatch.setattr(of_ggml, "cases", lambda types: [[contestant(goals.TORCH, "torch"), wrong]])
    monkeypatch.setattr(of_ggml, "Pace", lambda **_: FAST)
    monkeypatch.setattr(cli, "Pace", lambda **_: FAST)
    monkeypatch.setattr(peers, "why_not", lambda *_: "not here")
    monkeypatch.setattr(machine, "try_roofline", lambda *_, **__: (LIMITS, ""))
    arguments = ["ggml", "--shapes", "64x128", "--m", "1", "--name", "x", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 1 and "1 of our results are wrong" in done.output and "ggml: not here" in done.output
    record = report.load("x", tmp_path)
    assert record["results"][1]["ok"] is False and "commit" in record and record["missing_peers"] == {"ggml": "not here"}
    assert readme.goals_table(record) in of_ggml.markdown([record])
    assert CliRunner().invoke(cli.app, [*arguments, "--types", "q9"]).exit_code == 2


def test_int4_with_a_permutation_means_the_weight():
    weight = torch.randn(32, 256)
    prepared: Prepared = of_ggml.permuted("float32").prepare(weight, 1)
    assert (prepared.weight - weight).norm() / weight.norm() < 0.12
    x = torch.randn(3, 256)
    check(prepared, prepared.arithmetic or "int8", x, prepared.make()(x))
