"""A whole run on a GPU, with a fake in its place: the record, and what is made of it; the command."""

from __future__ import annotations

import json
import sys

import pytest
from rich.console import Console
from typer.testing import CliRunner

from . import __main__ as cli
from . import readme as cpu_readme
from . import report as files
from .conftest import contestant, raising
from .gpu import command, machine, peers, plot, readme, record, report
from .gpu.device import Gpu, NoDevice
from .gpu.shapes import parse_shapes
from .shapes import LayerShape
from .test_gpu_harness import FAST, LIMITS, TINY, FakeGpu, few_bytes, without_cuda  # noqa: F401 -- few_bytes: applies itself to every test

# -- a whole run, and what is made of it -------------------------------------------------------------------------------------------------


def fake_run(monkeypatch, gpu: FakeGpu, ms=(1, 4), minutes: float = 1.0, keep=lambda _: None) -> dict:
    monkeypatch.setattr(record, "our_contestants", lambda *_: [contestant("qkernels int4 float")])
    monkeypatch.setattr(peers, "TORCH", (contestant("cublas mm", "torch"),))
    monkeypatch.setattr(peers, "why_not", lambda peer: "not installed" if peer.name == "absent" else None)
    monkeypatch.setattr(machine, "measure_limits", lambda _: LIMITS)
    monkeypatch.setattr(machine, "snapshot", lambda _: {"driver_version": "580.1"} | dict.fromkeys(machine.SMI_FIELDS[2:], "1"))
    those = [contestant("absent", "peer"), contestant("peer [x]", "peer", prepare=raising(RuntimeError("no [thing]")))]
    shapes = [TINY, LayerShape(64, 256)]
    return record.measure(record.Options(shapes, list(ms), ["int4"], ["float"], "bfloat16", those, minutes, FAST), gpu, keep=keep)


@pytest.fixture
def made(monkeypatch) -> dict:
    return fake_run(monkeypatch, FakeGpu())


def test_record(made, tmp_path):
    assert len(made["results"]) == 2 * 2 * 3 and not made["unmeasured"] and made["missing_peers"] == {"absent": "not installed"}
    assert made["gpu"]["name"] == "NVIDIA Fake 80GB" and "uuid" not in json.dumps(made)
    assert [c["when"] for c in made["clocks"]] == ["before", "after the limits", "after 64x128", "after 64x256"]
    assert {"torch", "cuda"} <= set(made["versions"])
    files.save(made, "x", tmp_path)
    assert readme.markdown([files.load("x", tmp_path)])
    assert command.failed(made) == ""


def test_the_record_is_kept_after_every_shape(monkeypatch):
    kept = []
    fake_run(monkeypatch, FakeGpu(), keep=lambda now: kept.append(len(now["results"])))
    assert kept == [6, 12]


def test_a_run_without_time_says_so(monkeypatch):
    made = fake_run(monkeypatch, FakeGpu(), minutes=0)
    assert made["results"] == [] and len(made["unmeasured"]) == 4
    text = printed(made)
    assert "not measured: 64x128, 64x256 M=1,4: the time budget of 0 minutes was used up" in text
    assert "4 cases were not measured: the time budget" in readme.markdown([made])


def test_limits_that_fail_do_not_end_a_run(monkeypatch):
    gpu = FakeGpu()
    monkeypatch.setattr("benchmarks.gpu.machine.measure_limits", lambda _: 1 / 0)
    bad = record._limits(gpu, found := {"clocks": []})
    assert bad is None and found["limits"] is None and found["limits_note"].startswith("ZeroDivisionError")


def printed(made: dict, width: int = report.WIDTH) -> str:
    console = Console(width=width, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    report.show(made, console)
    return console.export_text()


def test_report(made):
    text = printed(made)
    parts = ("NVIDIA Fake 80GB, sm_90, 132 SMs", "copies at 3000 GB/s", "tiny o 64×128", "eager M=1", "–", "absent: not installed")
    for part in (*parts, "peer [x] 64x128, 64x256 M=1,4: RuntimeError: no [thing]", "<10 MB"):
        assert part in text, part
    assert text.index("× over the best of cuBLAS") > text.index("64×256")


def test_the_summary_is_short_and_last(made):
    shapes = parse_shapes("8b,70b")
    grown = [r | {"shape": s.name, "n": s.n, "k": s.k, "m": m} for s in shapes for m in (1, 2, 4, 8, 16) for r in made["results"][:3]]
    text = printed(made | {"results": grown})
    summary = text[text.rindex("× over the best of cuBLAS") :]
    assert len(summary) < 4000 and summary.count("MB") == 3


def test_failures_are_told_apart(made):
    """Ours that failed and wrong results stand out; another's that does not take this M does not, and has one line for all of them."""
    ours = made["results"][0]
    bad = ours | {"ok": False, "timing": None, "kernel": "triton_x"}
    rows = [bad | {"m": m, "shape": s, "reason": f"ValueError: M = {m} is not 1"} for m in (2, 4) for s in ("1x1", "2x2", "3x3", "4x4")]
    assert report._faults([r | {"kind": "torch", "contestant": "mv"} for r in rows]) == [
        "[yellow]mv[/] 4 shapes M=2,4: ValueError: M is not 1"
    ]
    assert report._faults(rows[:1])[0].startswith("[red]qkernels int4 float[/]")
    assert report._cell(rows[0]) == "[red]FAILED[/]" and report._cell(rows[0] | {"kind": "peer"}) == "–"
    assert report._cell(rows[0] | {"kind": "peer", "reason": "CheckFailed: NMSE"}) == "[red]WRONG[/]"
    assert report._label(rows, ours["contestant"]) == "qkernels int4 float (triton_x)"
    many = [r | {"reason": f"{i}"} for i, r in enumerate(rows * 3)]
    assert report._faults(many)[-1] == "… and 4 more kinds of failure, in the JSON"


def test_summary(made):
    rows = made["results"]
    small, other = (next(r for r in rows if r["kind"] == "qkernels" and r["m"] == 1 and r["shape"] == s) for s in ("64x128", "64x256"))
    by_m = {s.m: s for s in report.summarize(made)}
    assert set(by_m) == {1, 4} and by_m[1].size == "<10 MB"
    assert by_m[1].ours == (small["over_cublas"], other["over_cublas"]) and by_m[1].peers == ()
    assert by_m[1].shares == (small["share"], other["share"])
    assert [report._span(v, 2) for v in ((), (1.0,), (2.0, 1.004, 1.5))] == ["–", "1.00", "1.00–2.00"]
    assert [report.microseconds(us) for us in (1.234, 12.34, 12345.6)] == ["1.23", "12.3", "12346"]


def test_readme(made):
    section = readme.markdown([made])
    assert "**NVIDIA Fake 80GB** (sm_90, driver 580.1)" in section and "Not measured here: absent (not installed)." in section
    lines = [line for line in section.splitlines() if line.startswith("|")]
    assert lines[0] == "| Layer | × over cuBLAS (share of the limit) | M=1 | M=4 |"
    assert lines[2].startswith("| tiny o 64×128 | best of cuBLAS, µs | ") and lines[3].startswith("|  | qkernels int4 float | ")
    assert all(line.count("|") == 5 for line in lines) and " %)" in lines[3]


def test_the_cpu_results_do_not_see_the_gpu(made, tmp_path):
    files.save(made, "x", tmp_path / "gpu")
    assert files.load_all(tmp_path) == [] and cpu_readme.markdown(files.load_all(tmp_path)) == ""


def test_plot(made, tmp_path):
    pytest.importorskip("matplotlib")
    (path,) = plot.plot(made, tmp_path, "x")
    assert path.name == "x.png" and path.stat().st_size > 1000
    assert plot.plot(made | {"results": []}, tmp_path, "y") == []


# -- the command -----------------------------------------------------------------------------------------------------------------------


@without_cuda
def test_without_a_gpu_the_command_says_so(tmp_path):
    with pytest.raises(NoDevice, match="no CUDA device: "):
        Gpu()
    done = CliRunner().invoke(cli.app, ["gpu", "--smoke", "--out", str(tmp_path / "x")])
    assert done.exit_code == 1 and done.output.startswith("no CUDA device: ") and len(done.output.splitlines()) == 1


@pytest.mark.parametrize("wrong", [["--dtype", "float32"], ["--m", "0"], ["--shapes", "9b"], ["--peers", "no-such"], ["--out", __file__]])
def test_wrong_options(wrong):
    assert CliRunner().invoke(cli.app, ["gpu", *wrong]).exit_code == 2


def test_command(monkeypatch, tmp_path):
    gpu = FakeGpu()
    fake_run(monkeypatch, gpu)
    monkeypatch.setattr(command, "Gpu", lambda: gpu)
    monkeypatch.setattr(command, "PACE", FAST)
    monkeypatch.setattr(sys, "argv", ["benchmarks", "gpu"])
    arguments = ["gpu", "--shapes", "64x128", "--m", "1,4", "--rounds", "2", "--peers", "none", "--out", str(tmp_path)]
    done = CliRunner().invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    assert "s  64x128: timing M=4" in done.output and "wrote nvidia-fake-80gb.json" in done.output
    assert files.load("nvidia-fake-80gb", tmp_path)["pace"]["rounds"] == 2
    monkeypatch.setattr(record, "our_contestants", lambda *_: [contestant("wrong", spoil=lambda y: y * 2)])
    done = CliRunner().invoke(cli.app, [*arguments, "--no-save"])
    assert done.exit_code == 1 and "2 of our results are wrong or failed" in done.output
    gpu.broken = True
    done = CliRunner().invoke(cli.app, [*arguments, "--name", "lost"])
    assert done.exit_code == 1 and "the GPU stopped working" in done.output
    assert files.load("lost", tmp_path)["gpu_lost"]


def test_a_smoke_run_is_small():
    options = command.options("8b", ["1"], ["int4"], ["float"], "float16", "none", 7, 8, smoke=True)
    assert ([s.name for s in options.shapes], options.ms, options.pace.rounds) == (["4096x4096"], [1, 16, 256], 2)
