"""Time against M: one picture with a panel for every shape, and the GPU's limit as a line."""

from __future__ import annotations

import math
from pathlib import Path

from ..plot import STYLES
from .report import title

COLUMNS = 2


def plot(record: dict, folder: Path, name: str) -> list[Path]:
    """Write `<name>.png` with every shape that has at least two M. Raises ImportError without matplotlib."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    good = [r for r in record["results"] if r["ok"]]
    shapes = [s for s in dict.fromkeys(r["shape"] for r in good) if len({r["m"] for r in good if r["shape"] == s}) > 1]
    if not shapes:
        return []
    lines = math.ceil(len(shapes) / COLUMNS)
    figure, axes = pyplot.subplots(lines, COLUMNS, figsize=(8 * COLUMNS, 5.5 * lines), layout="constrained", squeeze=False)
    for panel in axes.flat[len(shapes) :]:
        panel.set_visible(False)
    for panel, shape in zip(axes.flat, shapes):
        _plot_shape(panel, title(record, shape), [r for r in good if r["shape"] == shape])
    figure.suptitle(f"{record['gpu']['name']}: µs per call in a CUDA graph (median, quartiles)")
    figure.savefig(folder / f"{name}.png", dpi=100)
    pyplot.close(figure)
    return [folder / f"{name}.png"]


def _plot_shape(axes, title: str, rows: list[dict]) -> None:
    for contestant in dict.fromkeys(r["contestant"] for r in rows):
        mine = [r for r in rows if r["contestant"] == contestant]
        ms = [r["m"] for r in mine]
        median, low, high = ([r["timing"][key] for r in mine] for key in ("median_us", "p25_us", "p75_us"))
        (line,) = axes.plot(ms, median, STYLES[mine[0]["kind"]], marker="o", markersize=3, label=contestant)
        axes.fill_between(ms, low, high, color=line.get_color(), alpha=0.15)
    ms = sorted({r["m"] for r in rows})
    limits = {m: min((r["limit_us"] for r in rows if r["m"] == m and r["limit_us"]), default=None) for m in ms}
    if all(limits.values()):
        axes.plot(ms, [limits[m] for m in ms], color="black", linewidth=2, label="limit of the GPU")
    axes.set(xscale="log", yscale="log", xlabel="M (rows of activations)", ylabel="µs", title=title)
    axes.set_xticks(ms, [str(m) for m in ms], minor=False)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=7)
