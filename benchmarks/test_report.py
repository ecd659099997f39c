"""What is made of the results: console, JSON, README, pictures, goals, exit code."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from . import __main__ as cli
from . import goals, machine, plot, readme, record, report
from .conftest import LIMITS, contestant


def test_report_prints_all(measured, capsys):
    from rich.console import Console

    report.show(measured, Console(width=200))
    text = capsys.readouterr().out
    for part in ("Test CPU", "WRONG", "FAILED", "skipped", "no such [thing]", "K = 128 is too small", "not installed", "7.0 µs"):
        assert part in text, part


def test_noise_is_stated(measured):
    even = {"ok": True, "timing": {"p25_us": 1.0, "p75_us": 1.1, "disturbed": 0}}
    assert report.noise_line(measured | {"results": [even]}) == ""
    uneven = {"ok": True, "timing": {"p25_us": 1.0, "p75_us": 2.0, "disturbed": 2}}
    line = report.noise_line(measured | {"results": [uneven]})
    assert "of 1 times, 1 were measured while others used the CPUs, and 1 have quartiles" in line


def test_json_round_trip(measured, tmp_path):
    path = report.save(measured, "x", tmp_path)
    loaded = report.load("x", tmp_path)
    assert json.loads(path.read_text()) == loaded and report.load_all(tmp_path) == [loaded]
    assert readme.markdown([loaded]) == readme.markdown(report.load_all(tmp_path))


def test_readme_is_replaced_between_the_markers(measured):
    section = readme.markdown([measured])
    assert "Test CPU" in section and "wrong" in section and "| **" in section and "64×256" in section
    text = "# head\n<!-- benchmarks:begin -->\nold\n<!-- benchmarks:end -->\ntail\n"
    new = readme.replaced(text, section)
    assert new.startswith("# head\n") and new.endswith("tail\n") and "old" not in new
    assert readme.current(new) == section and readme.replaced(new, section) == new
    with pytest.raises(ValueError, match="benchmarks:begin"):
        readme.replaced("no markers", section)


def test_plot(measured, tmp_path):
    pytest.importorskip("matplotlib")
    paths = plot.plot(measured, tmp_path, "x")
    assert [p.name for p in paths] == ["x-64x128.png", "x-64x256.png"] and all(p.stat().st_size > 1000 for p in paths)


def test_goals():
    row = {"contestant": goals.INT4, "shape": goals.SHAPE, "m": 1, "ok": True, "read_share": 0.9}
    made = {"results": [row | {"times_over": {}}], "cliff": [{"worst_ratio": 1.3}]}
    judged = {g["goal"]: g for g in goals.judge_all(made)}
    share = judged["int4 M=1: share of the read bandwidth"]
    assert share["met"] is True and share["value"] == "90 %"
    another = row | {"contestant": "another", "read_share": 1.2}
    made["results"] += [another | elsewhere for elsewhere in ({"m": 16}, {"shape": "64x64"}, {"ok": False}, {"read_share": None})]
    assert goals.judge_all(made)[0]["met"] is True
    made["results"].append(another)  # faster than reading alone: reading was disturbed
    assert goals.judge_all(made)[0]["met"] is None
    small = row | {"contestant": goals.INT4_FLOAT, "shape": "64x64", "times_over": {goals.ATEN_INT4: 0.5}}
    assert goals.worst(goals.INT4_FLOAT, goals.ATEN_INT4)({"results": [small]}) is None  # the goals are stated for one shape
    assert goals.worst(goals.INT4_FLOAT, goals.ATEN_INT4)({"results": [small | {"shape": goals.SHAPE}]}) == 0.5
    assert judged["largest t(M+1)/t(M), M = 1…64"]["met"] is False
    assert judged["int4 M=16: over bf16 F.linear"]["met"] is None


def test_pictures_are_optional(measured, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    cli.keep(measured, tmp_path, "x")
    text = capsys.readouterr().out
    assert "no pictures" in text and "pip install 'qkernels[bench]'" in text and f"wrote x.json in {tmp_path}" in text


def test_command_line(monkeypatch, tmp_path):
    monkeypatch.setattr(record, "our_contestants", lambda *_: [contestant("wrong", spoil=lambda y: y * 2)])
    monkeypatch.setattr(machine, "try_roofline", lambda *_, **__: (LIMITS, ""))
    arguments = ["--shapes", "128x128", "--m", "1", "--format", "int4", "--rounds", "2", "--peers", "none", "--no-extras", "--name", "x"]
    out = tmp_path / "a" / "b"
    done = CliRunner().invoke(cli.app, [*arguments, "--out", str(out)])
    assert done.exit_code == 1 and "1 of our results are wrong" in done.output
    assert report.load("x", out)["results"][0]["ok"] is False
    for wrong in (["--dtype", "int3"], ["--out", __file__], ["--out", f"{__file__}/x"]):  # said before anything is measured
        assert CliRunner().invoke(cli.app, [*arguments, *wrong]).exit_code == 2
    monkeypatch.setattr(readme, "README", out / "README.md")
    assert CliRunner().invoke(cli.app, ["readme", "--write"]).exit_code == 2


def test_a_commit_is_that_of_our_checkout(monkeypatch):
    monkeypatch.setattr(machine, "ROOT", Path(__file__).parent)  # as an environment within somebody's repository
    assert machine.commit() == "unknown"


def test_command_has_no_path_of_this_machine():
    assert machine.command(["/a/b/benchmarks/__main__.py", "--m", "1"]) == "python -m benchmarks --m 1"
    assert machine.command(["/a/bin/qkernels", "bench", "--m", "1"]) == "qkernels bench --m 1"
