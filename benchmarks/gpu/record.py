"""One whole run on a GPU: its limits, peers, every shape, as one JSON-able record."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch

from .. import machine as host
from ..base import Contestant
from ..run import Say, first_line
from ..shapes import LayerShape
from ..timing import Pace
from . import machine, peers
from .device import Gpu
from .ours import contestants as our_contestants
from .run import Bench, Budget, ShapeReport
from .timing import PACE, rotation_bytes


@dataclass(frozen=True)
class Options:
    """What to measure. `formats` may be empty: then torch and the peers are measured alone."""

    shapes: list[LayerShape]
    ms: list[int]
    formats: list[str]
    computes: list[str]
    dtype: str
    peers: list[Contestant]
    minutes: float = 7
    pace: Pace = field(default_factory=lambda: PACE)


def measure(options: Options, gpu: Gpu, say: Say = lambda _: None, keep: Callable[[dict], object] = lambda _: None) -> dict:
    """Run everything. `say` is told each step; `keep` gets the record so far after every shape, in case we are killed.

    Nothing that a contestant does makes it raise; the record says what was not measured, and why.
    """
    budget = Budget(options.minutes)
    with torch.inference_mode():
        contestants, missing = _contestants(options, say)
        say("measuring the GPU's limits")
        record = _begin(options, gpu, contestants) | {"missing_peers": missing}
        bench = Bench(gpu, options.pace, budget, _limits(gpu, record), record["threads"], say)
        for shape in options.shapes:
            _add(record, shape, bench.measure_shape(shape, contestants, options.ms))
            record |= {"gpu_lost": gpu.lost, "seconds": budget.spent_s()}
            _note_clocks(record, gpu, f"after {shape.name}")
            keep(record)
    return record


def _contestants(options: Options, say: Say) -> tuple[list[Contestant], dict[str, str]]:
    """All that take part, and the peers that cannot, with the reason."""
    missing: dict[str, str] = {}
    for peer in options.peers:
        say(f"trying {peer.name}")
        if reason := peers.why_not(peer):
            missing[peer.name] = reason
    ours = our_contestants(options.formats, options.computes, options.dtype)
    return [*ours, *peers.TORCH, *(peer for peer in options.peers if peer.name not in missing)], missing


def _begin(options: Options, gpu: Gpu, contestants: Iterable[Contestant]) -> dict:
    """The record before anything is measured."""
    found = {name: value for name, value in gpu.properties().items() if name != "uuid"}
    record = host.provenance(torch.get_num_threads())
    record["versions"] |= machine.versions(c.distribution or c.package for c in contestants if c.package)
    record |= {"command": host.command(without_out(sys.argv)), "gpu": found, "dtype": options.dtype, "minutes": options.minutes}
    record |= {"pace": asdict(options.pace), "rotation_bytes": rotation_bytes(found["l2_bytes"])}
    record |= {"labels": {shape.name: shape.label for shape in options.shapes}, "clocks": []}
    record |= {"results": [], "unmeasured": [], "prepare_s": {}, "gpu_lost": "", "seconds": 0.0}
    _note_clocks(record, gpu, "before")
    return record


def _limits(gpu: Gpu, record: dict) -> machine.Limits | None:
    """Measure the limits and put them into the record; times are worth having without them."""
    limits, note = None, ""
    try:
        with gpu.watch("the limits"):
            limits = machine.measure_limits(gpu)
    except Exception as error:
        note = first_line(error)
    record |= {"limits": asdict(limits) if limits else None, "limits_note": note}
    _note_clocks(record, gpu, "after the limits")
    return limits


def _note_clocks(record: dict, gpu: Gpu, when: str) -> None:
    record["clocks"].append({"when": when} | machine.snapshot(gpu.properties()["uuid"]))


def _add(record: dict, shape: LayerShape, report: ShapeReport) -> None:
    record["results"] += [asdict(r) for r in report.results]
    record["unmeasured"] += [{"shape": shape.name, "m": m, "reason": reason} for m, reason in report.unmeasured.items()]
    record["prepare_s"][shape.name] = report.prepare_s


def without_out(argv: list[str]) -> list[str]:
    """A command line without `--out`: the folder is one of that machine."""
    kept, skip = [], False
    for word in argv:
        if not (skip or word == "--out" or word.startswith("--out=")):
            kept.append(word)
        skip = word == "--out"
    return kept
