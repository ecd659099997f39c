"""The README's benchmark section, printed from the JSON of the results, never typed."""

from __future__ import annotations

from .goals import INT4, SHAPE, TORCH
from .machine import ROOT
from .report import limits_line, noise_line

CPU, GPU = "benchmarks", "gpu"  # sections, between <!-- name:begin --> and <!-- name:end -->
README = ROOT / "README.md"


def markdown(records: list[dict]) -> str:
    """The section for all records: for each its machine, the times, the other shapes in short, and the goals."""
    return "\n\n".join(_machine_section(record) for record in records)


def _machine_section(record: dict) -> str:
    shapes = list(dict.fromkeys(r["shape"] for r in record["results"]))
    main = SHAPE if SHAPE in shapes else shapes[0]
    parts = [head(record), *([noise] if (noise := noise_line(record)) else []), _times_table(record, main)]
    if len(shapes) > 1:
        parts.append(_shapes_table(record, shapes))
    if missing := record.get("missing_peers"):
        parts.append("Not measured here: " + "; ".join(f"{name} ({reason})" for name, reason in missing.items()) + ".")
    parts.append(goals_table(record))
    return "\n\n".join(parts)


def head(record: dict) -> str:
    """Machine, versions and command in two lines."""
    machine, limits = record["machine"], record.get("roofline")
    limit = f" Measured limits: {limits_line(limits)}." if limits else ""
    peers = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if name not in ("python", "numpy"))
    return (
        f"**{machine['cpu']}**, {record['threads']} threads, {record['date'][:10]}, commit {record['commit'][:9]}.{limit}\n"
        f"{peers}. `{record['command']}`"
    )


def _times_table(record: dict, shape: str) -> str:
    """One row per contestant, one column per M: milliseconds and share of the limit; the fastest of a column is bold."""
    rows = [r for r in record["results"] if r["shape"] == shape]
    ms = sorted({r["m"] for r in rows})
    fastest = {m: min((r["timing"]["median_us"] for r in rows if r["m"] == m and r["ok"]), default=None) for m in ms}
    body = []
    for name in dict.fromkeys(r["contestant"] for r in rows):
        by_m = {r["m"]: r for r in rows if r["contestant"] == name}
        weights = next(iter(by_m.values()))["weights"]
        body.append([name, weights, *(_time_cell(by_m.get(m), fastest[m]) for m in ms)])
    return table([f"{shape.replace('x', '×')}, ms (share of the limit)", "Weights", *(f"M={m}" for m in ms)], body)


def _time_cell(row: dict | None, fastest_us: float | None) -> str:
    if row is None or row["skipped"]:
        return "–"
    if not row["ok"]:
        return "wrong"
    us = row["timing"]["median_us"]
    share = "" if row["share"] is None else f" ({100 * row['share']:.0f} %)"
    text = f"{us / 1e3:.3g}{share}"
    return f"**{text}**" if us == fastest_us else text


def _shapes_table(record: dict, shapes: list[str]) -> str:
    """How many times faster than bf16 F.linear our int4 layer is, on every shape."""
    ms = sorted({r["m"] for r in record["results"]})
    times = {(r["shape"], r["m"]): r["times_over"].get(TORCH) for r in record["results"] if r["contestant"] == INT4}
    cells = [[shape.replace("x", "×"), *(_times_cell(times.get((shape, m))) for m in ms)] for shape in shapes]
    return table([f"{INT4}, × over {TORCH}", *(f"M={m}" for m in ms)], cells)


def _times_cell(times: float | None) -> str:
    return "–" if times is None else f"{times:.1f} ×"


def goals_table(record: dict) -> str:
    return table(["Goal", "Bound", "Measured", ""], [_goal_row(g) for g in record["goals"]])


def _goal_row(goal: dict) -> list[str]:
    return [goal["goal"], goal["bound"], goal["value"], {True: "met", False: "**missed**", None: "–"}[goal["met"]]]


def table(head: list[str], rows: list[list[str]]) -> str:
    rule = ["---", *(["---:"] * (len(head) - 1))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (head, rule, *rows))


def current(text: str, name: str = CPU) -> str:
    """What stands between a section's markers. Raises: ValueError without them."""
    return _split(text, name)[1].strip()


def replaced(text: str, section: str, name: str = CPU) -> str:
    """The text with `section` between the markers."""
    head, _, tail = _split(text, name)
    return f"{head}\n{section}\n{tail}"


def _split(text: str, name: str) -> tuple[str, str, str]:
    """Text up to and with the first marker, between the two, and from the second on."""
    begin, end = f"<!-- {name}:begin -->", f"<!-- {name}:end -->"
    head, found, rest = text.partition(begin)
    inside, also_found, tail = rest.partition(end)
    if not (found and also_found):
        raise ValueError(f"no {begin} … {end} in the text")
    return head + begin, inside, end + tail
