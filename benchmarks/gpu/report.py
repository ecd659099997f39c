"""Show a GPU record on the console: a table per shape, what went wrong, and a summary, which comes last."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..report import color, verdict
from .shapes import CLASSES, class_of

WIDTH = 250  # of a table with eleven M in a file
READING_M = 8  # up to here a product is as fast as its weight is read, and the share is one of the bandwidth
LONGEST = 160  # characters of a reason
MOST_FAULTS = 20


def show(record: dict, console: Console) -> None:
    """Print all; the summary is last, where a cut-off log still has it."""
    console.print(machine_text(record), highlight=False, soft_wrap=True)
    for shape, rows in groupby(record["results"], key=lambda r: r["shape"]):
        console.print(shape_table(title(record, shape), list(rows)))
    for line in notes(record):
        console.print(line, highlight=False, soft_wrap=True)
    console.print(summary_table(record))


def title(record: dict, shape: str) -> str:
    """`8b qkv 6144×4096`."""
    return f"{record['labels'].get(shape, '')} {shape.replace('x', '×')}".strip()


def machine_text(record: dict) -> str:
    """GPU, versions, measured limits and clocks, a line each."""
    gpu, versions = record["gpu"], record["versions"]
    memory, l2 = gpu["memory_bytes"] / (1 << 30), gpu["l2_bytes"] / (1 << 20)
    head = f"{gpu['name']}, sm_{gpu['sm']}, {gpu['sms']} SMs, {l2:.0f} MiB L2, {memory:.0f} GiB; driver {driver(record)}"
    software = ", ".join(f"{name} {version}" for name, version in versions.items())
    limits = limits_text(record["limits"]) if record["limits"] else f"limits not measured: {record['limits_note']}"
    return "\n".join([head, software, limits, *(clocks_text(c) for c in record["clocks"])])


def driver(record: dict) -> str:
    return record["clocks"][0].get("driver_version", "unknown")


def limits_text(limits: dict) -> str:
    """The measured limits in words."""
    int8 = f"int8 {limits['int8_tops']:.0f} TOP/s" if limits["int8_tops"] else limits["note"]
    return f"copies at {limits['copy_gbs']:.0f} GB/s (read + written); bf16 {limits['bf16_tflops']:.0f} TFLOP/s, {int8}"


def clocks_text(clocks: dict) -> str:
    if "note" in clocks:
        return f"{clocks['when']}: {clocks['note']}"
    mhz = f"SM {clocks['clocks.sm']} of {clocks['clocks.max.sm']} MHz, memory {clocks['clocks.mem']} MHz"
    return f"{clocks['when']}: {mhz}, {clocks['power.draw']} of {clocks['power.limit']} W, {clocks['temperature.gpu']} °C"


def shape_table(title: str, rows: list[dict]) -> Table:
    """One shape: a row per contestant, a column per M with µs, share of the limit and × over the best of cuBLAS."""
    ms = sorted({r["m"] for r in rows})
    table = Table(title=f"{title}: µs, share of the limit, × cuBLAS", title_justify="left", box=SIMPLE_HEAD, pad_edge=False)
    for column in ("", f"eager M={ms[0]}", *(f"M={m}" for m in ms)):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name in dict.fromkeys(r["contestant"] for r in rows):
        by_m = {r["m"]: r for r in rows if r["contestant"] == name}
        eager = by_m[ms[0]]["eager_us"] if ms[0] in by_m else None
        table.add_row(escape(_label(rows, name)), "" if eager is None else microseconds(eager), *(_cell(by_m.get(m)) for m in ms))
    return table


def microseconds(us: float) -> str:
    """Three digits or more, never an exponent."""
    return f"{us:.{2 if us < 10 else 1 if us < 1000 else 0}f}"


def _label(rows: list[dict], name: str) -> str:
    """A contestant's name; of ours, with the kernel that serves it."""
    kernels = dict.fromkeys(r["kernel"] for r in rows if r["contestant"] == name and r["kind"] == "qkernels" and r["kernel"])
    return " ".join([name, *(f"({kernel})" for kernel in kernels)])


def cannot(row: dict) -> bool:
    """Whether a row is of another's contestant that raised: not every way of computing takes every M. The reason is listed."""
    return not row["ok"] and row["kind"] != "qkernels" and verdict(row) == "FAILED"


def _cell(row: dict | None) -> str:
    if row is None:
        return ""
    if not row["ok"]:
        return "–" if cannot(row) else f"[{color(row)}]{verdict(row)}[/]"
    share = "" if row["share"] is None else f" {100 * row['share']:.0f}%"
    over = "" if row["over_cublas"] is None else f" {row['over_cublas']:.2f}×"
    return f"{microseconds(row['timing']['median_us'])}{share}{over}"


def notes(record: dict) -> list[str]:
    """What was not measured, and what failed, in rich's markup."""
    lines = [f"[yellow]{escape(name)}[/]: {escape(_short(reason))}" for name, reason in record["missing_peers"].items()]
    lines += _faults(record["results"])
    if record["gpu_lost"]:
        lines.append(f"[red]the GPU stopped working: {escape(_short(record['gpu_lost']))}[/]")
    for reason, cases in _grouped((u["reason"], u["shape"], u["m"]) for u in record["unmeasured"]):
        lines.append(f"[red]not measured: {cases}: {escape(_short(reason))}[/]")
    return lines


def _faults(results: list[dict]) -> list[str]:
    """One line per contestant and reason."""
    bad = [(r, "yellow" if cannot(r) else color(r)) for r in results if not r["ok"]]
    reasons = [r["reason"].replace(f"M = {r['m']} ", "M ") for r, _ in bad]  # the same at every M
    grouped = _grouped(((r["contestant"], hue, reason), r["shape"], r["m"]) for (r, hue), reason in zip(bad, reasons))
    lines = [f"[{hue}]{escape(name)}[/] {cases}: {escape(_short(reason))}" for (name, hue, reason), cases in grouped]
    more = [f"… and {len(lines) - MOST_FAULTS} more kinds of failure, in the JSON"] if len(lines) > MOST_FAULTS else []
    return lines[:MOST_FAULTS] + more


def _grouped(found: Iterable[tuple]) -> list[tuple]:
    """(key, shape, m) … -> (key, "6144x4096, 4096x4096 M=1,2; …"), keys in the order of first mention."""
    cases: dict[object, dict[str, list[str]]] = {}
    for key, shape, m in found:
        cases.setdefault(key, {}).setdefault(shape, []).append(str(m))
    return [(key, _cases(by_shape)) for key, by_shape in cases.items()]


def _cases(by_shape: dict[str, list[str]]) -> str:
    """Shapes with the same M together; by number where they are many."""
    shapes: dict[str, list[str]] = {}
    for shape, ms in by_shape.items():
        shapes.setdefault(",".join(ms), []).append(shape)
    return "; ".join(f"{', '.join(those) if len(those) < 4 else f'{len(those)} shapes'} M={ms}" for ms, those in shapes.items())


def _short(text: str) -> str:
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


@dataclass(frozen=True)
class Summary:
    """The shapes of one class at one M: × over the best of cuBLAS of our fastest and the fastest like peer on each, and our share."""

    size: str
    m: int
    ours: tuple[float, ...]
    peers: tuple[float, ...]
    shares: tuple[float, ...]


def summarize(record: dict) -> list[Summary]:
    """One entry per class of CLASSES and M, where anything was measured."""
    ms = sorted({r["m"] for r in record["results"]})
    found = []
    for size in CLASSES:
        rows = [r for r in record["results"] if r["ok"] and class_of(r["n"], r["k"]) == size]
        for m in ms if rows else []:
            ours = best_rows(rows, "qkernels", m)
            kinds = {r["arithmetic"] for r in ours}  # int8 activations are no match for 16-bit ones
            peers = best_rows([r for r in rows if r["arithmetic"] in kinds or not kinds], "peer", m)
            ratios = (tuple(r["over_cublas"] for r in side if r["over_cublas"] is not None) for side in (ours, peers))
            found.append(Summary(size, m, *ratios, tuple(r["share"] for r in ours if r["share"] is not None)))
    return found


def best_rows(rows: list[dict], kind: str, m: int) -> list[dict]:
    """The fastest of one kind at one M, for every shape."""
    mine = [r for r in rows if r["kind"] == kind and r["m"] == m and r["ok"]]
    shapes = dict.fromkeys(r["shape"] for r in mine)
    return [min((r for r in mine if r["shape"] == shape), key=lambda r: r["timing"]["median_us"]) for shape in shapes]


def summary_table(record: dict) -> Table:
    """Rows are M; for every class of sizes: ours, the best peer, our share. A range spans the shapes of the class."""
    title = "× over the best of cuBLAS: our fastest, fastest such peer; our share of the limit"
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD)
    summaries = summarize(record)
    sizes = [size for size in CLASSES if any(s.size == size for s in summaries)]
    table.add_column("M", justify="right")
    for size in sizes:
        for column in (f"{size}\nours", "\npeer", "\nshare"):
            table.add_column(column, justify="right", no_wrap=True)
    for m in sorted({s.m for s in summaries}):
        cells = []
        for size in sizes:
            s = next(s for s in summaries if (s.size, s.m) == (size, m))
            shares = _span([100 * share for share in s.shares], 0, "%") if m <= READING_M else ""
            cells += [_span(s.ours, 2), _span(s.peers, 2), shares]
        table.add_row(str(m), *cells)
    return table


def _span(values: Iterable[float], digits: int, unit: str = "") -> str:
    """`2.10–2.60`, or one number where they agree."""
    ends = [f"{end(values):.{digits}f}" for end in (min, max)] if (values := list(values)) else []
    return "–".join(dict.fromkeys(ends)) + unit if ends else "–"
