"""The README's GPU section, printed from the JSON of the results, never typed."""

from __future__ import annotations

from ..readme import table
from .report import best_rows, driver, limits_text, microseconds, title


def markdown(records: list[dict]) -> str:
    """For each record its machine, and for every shape the time of cuBLAS and what we and the peers make of it."""
    return "\n\n".join(_section(record) for record in records)


def _section(record: dict) -> str:
    parts = [_head(record), _speeds(record)]
    if record["missing_peers"]:
        parts.append("Not measured here: " + "; ".join(f"{name} ({reason})" for name, reason in record["missing_peers"].items()) + ".")
    if record["unmeasured"]:
        reasons = "; ".join(dict.fromkeys(u["reason"] for u in record["unmeasured"]))
        parts.append(f"{len(record['unmeasured'])} cases were not measured: {reasons}.")
    return "\n\n".join(parts)


def _head(record: dict) -> str:
    gpu = record["gpu"]
    limits = f" Measured limits: {limits_text(record['limits'])}." if record["limits"] else ""
    software = ", ".join(f"{name} {version}" for name, version in record["versions"].items() if name not in ("python", "numpy"))
    return (
        f"**{gpu['name']}** (sm_{gpu['sm']}, driver {driver(record)}), {record['date'][:10]}, commit {record['commit'][:9]}.{limits}\n"
        f"{software}. `{record['command']}`"
    )


def _speeds(record: dict) -> str:
    """Rows: for every shape cuBLAS in µs, then ours and the peers as × over it (share of the limit); the fastest is bold."""
    rows = record["results"]
    ms = sorted({r["m"] for r in rows})
    body = []
    for shape in dict.fromkeys(r["shape"] for r in rows):
        here = [r for r in rows if r["shape"] == shape and r["ok"]]
        best = {m: max((r["over_cublas"] or 0 for r in here if r["m"] == m), default=0) for m in ms}
        body.append([title(record, shape), "best of cuBLAS, µs", *(_cublas_cell(here, m) for m in ms)])
        for name in dict.fromkeys(r["contestant"] for r in here if r["kind"] != "torch"):
            by_m = {r["m"]: r for r in here if r["contestant"] == name}
            body.append(["", name, *(_cell(by_m.get(m), best[m]) for m in ms)])
    return table(["Layer", "× over cuBLAS (share of the limit)", *(f"M={m}" for m in ms)], body)


def _cublas_cell(rows: list[dict], m: int) -> str:
    fastest = best_rows(rows, "torch", m)
    return microseconds(fastest[0]["timing"]["median_us"]) if fastest else "–"


def _cell(row: dict | None, best: float) -> str:
    if row is None or row["over_cublas"] is None:
        return "–"
    share = "" if row["share"] is None else f" ({100 * row['share']:.0f} %)"
    text = f"{row['over_cublas']:.2f}{share}"
    return f"**{text}**" if row["over_cublas"] == best else text
