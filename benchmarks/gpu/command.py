"""What `python -m benchmarks gpu` does, behind its options."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from .. import report as files
from ..ours import DTYPES
from ..peers import select
from . import machine, peers, record, report
from .device import Gpu, NoDevice
from .report import WIDTH
from .run import Budget
from .shapes import parse_shapes
from .timing import PACE

__all__ = ["WIDTH", "Gpu", "NoDevice", "failed", "measure", "name_of", "options"]

SMOKE = ("4096x4096", ["1", "16", "256"], 2)  # shapes, M, rounds


def options(
    shapes: str, ms: list[str], formats: list[str], computes: list[str], dtype: str, names: str, minutes: float, rounds: int, smoke: bool
) -> record.Options:
    """Check what was asked for; a smoke run has shapes, M and rounds of its own. Raises: ValueError."""
    if smoke:
        shapes, ms, rounds = SMOKE
    if dtype not in DTYPES or dtype == "float32":
        raise ValueError(f"unknown dtype {dtype!r}; known: bfloat16, float16")
    rows = [int(m) for m in ms]
    if not rows or min(rows) < 1 or rounds < 1:
        raise ValueError(f"every M and the number of rounds are at least 1, not {', '.join(ms) or 'nothing'} and {rounds}")
    pace = replace(PACE, rounds=rounds)
    return record.Options(parse_shapes(shapes), rows, formats, computes, dtype, select(names, peers.OTHERS), minutes, pace)


def name_of(gpu: Gpu, smoke: bool) -> str:
    """File name of the results; a smoke run's do not take the place of others."""
    return machine.slug(gpu.properties()["name"]) + ("-smoke" if smoke else "")


def measure(options: record.Options, gpu: Gpu, folder: Path | None, name: str, console: Console) -> dict:
    """Measure and print; with a folder, the JSON is written after every shape."""
    keep: Callable[[dict], object] = (lambda made: files.save(made, name, folder)) if folder else (lambda _: None)
    with narrator(console, Budget(options.minutes)) as say:
        made = record.measure(options, gpu, say, keep=keep)
    report.show(made, console)
    return made


@contextmanager
def narrator(console: Console, clock: Budget) -> Iterator[Callable[[str], None]]:
    """Say what is being done: in place on a terminal, a line each with the seconds so far in a log, which shows where a run hung."""
    if console.is_terminal:
        with console.status("") as status:
            yield lambda text: status.update(f"{clock.spent_s():.0f} s  {text}")
    else:
        yield lambda text: console.print(f"{clock.spent_s():6.1f} s  {text}", highlight=False, markup=False, soft_wrap=True)


def failed(made: dict) -> str:
    """Why the exit code is 1; "" when it is not."""
    if made["gpu_lost"]:
        return "the GPU stopped working before all was measured"
    reds = files.reds(made)
    return f"{len(reds)} of our results are wrong or failed: no speed is given for them" if reds else ""
