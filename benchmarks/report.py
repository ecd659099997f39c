"""Show a record on the console, and keep it as JSON."""

from __future__ import annotations

import json
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .goals import TORCH

WIDE = 1.5  # third over first quartile: more than any kernel's own variation
TOLERATED = 0.05  # share of the times that may be wide or disturbed
PUBLISHED = Path(__file__).parent / "results"  # in a checkout; wheels hold no results
RESULTS = PUBLISHED if PUBLISHED.is_dir() else Path("benchmarks-results")  # nothing is written among installed packages


def save(record: dict, name: str, folder: Path = RESULTS) -> Path:
    """Write a record as `<name>.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(_rounded(record), indent=1, ensure_ascii=False) + "\n")
    return path


def _rounded(value: object) -> object:
    """Four significant digits: the rest is noise, and would be noise in every diff."""
    if isinstance(value, float):
        return float(f"{value:.4g}")
    if isinstance(value, dict):
        return {key: _rounded(v) for key, v in value.items()}
    return [_rounded(v) for v in value] if isinstance(value, (list, tuple)) else value


def load(name: str, folder: Path = RESULTS) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def load_all(folder: Path = RESULTS) -> list[dict]:
    """All records of a folder, by name."""
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def show(record: dict, console: Console) -> None:
    """Print machine, one table per shape and M, what could not be measured, and the goals."""
    console.print(machine_line(record))
    if warning := noise_line(record):
        console.print(f"[yellow]{warning}[/]", highlight=False)
    for (shape, m), rows in groupby(record["results"], key=lambda r: (r["shape"], r["m"])):
        _show_case(f"{shape}  M={m}", list(rows), console)
    for section in ("cliff", "overhead", "memory"):
        show_section(section, record.get(section, []), console)
    for name, reason in record.get("missing_peers", {}).items():
        console.print(f"[yellow]{name}[/]: {escape(reason)}", highlight=False)
    for fault in record.get("faults", []):
        console.print(f"[red]{fault['contestant']}: {escape(fault['reason'])}[/]", highlight=False)
    show_goals(record["goals"], console)


def machine_line(record: dict) -> str:
    """CPU, threads, versions and measured limits in two lines."""
    machine, limits = record["machine"], record.get("roofline")
    gib = machine["memory_bytes"] / (1 << 30)
    head = f"{machine['cpu']}, {machine['cores']} cores, {gib:.0f} GiB, {record['threads']} threads, torch {record['versions']['torch']}"
    return f"{head}\n{limits_line(limits) if limits else 'limits not measured: ' + record.get('roofline_note', '')}"


def noise_line(record: dict) -> str:
    """Say when the machine was too busy for the times to mean much; "" when it was quiet."""
    times = [r["timing"] for r in record["results"] if r["ok"]]
    wide = sum(t["p75_us"] > WIDE * t["p25_us"] for t in times)
    disturbed = sum(t["disturbed"] > 0 for t in times)
    if max(wide, disturbed) <= len(times) * TOLERATED:
        return ""
    others = f"{disturbed} were measured while others used the CPUs"
    return f"Noisy: of {len(times)} times, {others}, and {wide} have quartiles over {WIDE} × apart."


def limits_line(limits: dict) -> str:
    """The measured limits in words."""
    bf16 = f"{limits['bf16_gflops']:.0f} GFLOP/s" if limits["bf16_gflops"] else "none"
    return (
        f"reads {limits['read_gbs']:.1f} GB/s; int8 {limits['int8_gops']:.0f} GOP/s, bf16 {bf16}, "
        f"fp32 {limits['fp32_gflops']:.0f} GFLOP/s ({limits['level']})"
    )


def _show_case(title: str, rows: list[dict], console: Console) -> None:
    """One shape and M; a wrong result is red and has no speed."""
    table = Table(title=title, title_justify="left")
    table.add_column("", no_wrap=True)
    for column in ("ms", "quartiles", "least", "GB/s", "GOP/s", "of limit", "× bf16", "NMSE"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        error = "" if row["nmse"] is None else f"{row['nmse']:.1e}"
        if row["ok"]:
            table.add_row(row["contestant"], *_speed_cells(row), error)
        else:
            table.add_row(f"[{color(row)}]{row['contestant']}[/]", f"[{color(row)}]{verdict(row)}[/]", *[""] * 6, error)
    console.print(table)
    for row in (r for r in rows if not r["ok"]):
        console.print(f"[{color(row)}]{row['contestant']}: {escape(row['reason'])}[/]", highlight=False)


def color(row: dict) -> str:
    return "yellow" if row["skipped"] else "red"


def verdict(row: dict) -> str:
    if row["skipped"]:
        return "skipped"
    return "WRONG" if row["reason"].startswith("CheckFailed") else "FAILED"


def _speed_cells(row: dict) -> list[str]:
    t = row["timing"]
    us = t["median_us"]
    share = "" if row["share"] is None else f"{100 * row['share']:.0f} %"
    times = row["times_over"].get(TORCH, 1.0 if row["contestant"] == TORCH else None)
    rates = [f"{row['nbytes'] / us / 1e3:.1f}", f"{2 * row['m'] * row['n'] * row['k'] / us / 1e3:.0f}"]
    spread = f"{t['p25_us'] / 1e3:.3f}–{t['p75_us'] / 1e3:.3f}"
    return [f"{us / 1e3:.3f}", spread, f"{t['min_us'] / 1e3:.3f}", *rates, share, "" if times is None else f"{times:.2f}"]


def show_section(section: str, entries: list[dict], console: Console) -> None:
    """Print the short lines of the cliff, overhead or memory section."""
    for e in entries:
        if section == "cliff":
            line = f"t(M+1)/t(M) at most {e['worst_ratio']:.2f}, from M={e['worst_m']}"
        elif section == "overhead":
            line = f"{e['layer_us']:.1f} µs a call, F.linear {e['f_linear_us']:.1f}, nn.Linear {e['nn_linear_us']:.1f}"
        else:
            line = f"{e['held_bytes']} bytes held, format {e['format_bytes']} ({e['ratio']:.3f} ×), stated {e['stated_bytes']}"
        console.print(f"{section}: {e['contestant']}: {line}", highlight=False)


def show_goals(goals: list[dict], console: Console) -> None:
    """Print the goals, met in green and missed in red."""
    table = Table(title="goals (stated for two Zen4 cores)", title_justify="left")
    for column in ("goal", "bound", "measured", "met"):
        table.add_column(column, justify="left" if column == "goal" else "right")
    words = {True: "[green]met[/]", False: "[red]missed[/]", None: "–"}
    for goal in goals:
        table.add_row(goal["goal"], goal["bound"], goal["value"], words[goal["met"]])
    console.print(table)


def reds(record: dict) -> list[dict]:
    """Our own results that are wrong or failed; a peer's fault is reported but is not ours."""
    wrong = [r for r in record["results"] if r["kind"] == "qkernels" and not r["ok"] and not r["skipped"]]
    return wrong + record.get("faults", [])
