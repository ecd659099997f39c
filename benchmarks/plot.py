"""Time against M, one picture per shape, with the machine's limit as a line."""

from __future__ import annotations

from pathlib import Path

STYLES = {"qkernels": "-", "torch": "--", "peer": ":"}


def plot(record: dict, folder: Path, name: str) -> list[Path]:
    """Write `<name>-<shape>.png` for every shape with at least two M. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    paths = []
    for shape in dict.fromkeys(r["shape"] for r in record["results"]):
        rows = [r for r in record["results"] if r["shape"] == shape and r["ok"]]
        if len({r["m"] for r in rows}) > 1:
            paths.append(folder / f"{name}-{shape}.png")
            _plot_shape(record, shape, rows, paths[-1])
    return paths


def _plot_shape(record: dict, shape: str, rows: list[dict], path: Path) -> None:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 5.5), layout="constrained")
    for contestant in dict.fromkeys(r["contestant"] for r in rows):
        mine = [r for r in rows if r["contestant"] == contestant]
        times = [[r["timing"][key] / 1e3 for r in mine] for key in ("median_us", "p25_us", "p75_us")]
        (line,) = axes.plot([r["m"] for r in mine], times[0], STYLES[mine[0]["kind"]], marker="o", markersize=3, label=contestant)
        axes.fill_between([r["m"] for r in mine], times[1], times[2], color=line.get_color(), alpha=0.15)
    _plot_limit(axes, rows)
    ms = sorted({r["m"] for r in rows})
    axes.set(xscale="log", yscale="log", xlabel="M (rows of activations)", ylabel="ms per call (median, quartiles)")
    axes.set_xticks(ms, [str(m) for m in ms], minor=False)
    axes.set_title(f"{shape.replace('x', ' × ')}, {record['machine']['cpu']}, {record['threads']} threads")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_limit(axes, rows: list[dict]) -> None:
    """The lowest limit of any contestant: no weights are smaller and no arithmetic faster than those that took part."""
    limits: dict[int, float] = {}
    for r in rows:
        if r["limit_us"] is not None:
            limits[r["m"]] = min(r["limit_us"], limits.get(r["m"], r["limit_us"]))
    if limits:
        axes.plot(sorted(limits), [limits[m] / 1e3 for m in sorted(limits)], color="black", linewidth=2, label="limit of the machine")
