"""One whole run: limits, peers, every shape, the extras and the goals, as one JSON-able record."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch

from . import machine, peers
from .base import Contestant
from .cliff import measure_cliff
from .goals import SHAPE, judge_all
from .neighbours import Neighbours
from .ours import contestants as our_contestants
from .overhead import measure_memory, measure_overhead
from .peers import ggml
from .run import Say, measure_shape, rotation_bytes, with_limits
from .shapes import LayerShape, parse_shapes
from .timing import Pace

CLIFF_CASES = (("int4", "int8"), ("int8", "int8"))


@dataclass(frozen=True)
class Options:
    """What to measure. `formats` may be empty: then torch and the peers are measured alone."""

    shapes: list[LayerShape]
    ms: list[int]
    formats: list[str]
    computes: list[str]
    dtype: str
    threads: int
    peers: list[Contestant]
    extras: bool = True
    pace: Pace = field(default_factory=Pace)

    def steps(self, present: int) -> int:
        """How often progress is reported: with `present` peers taking part."""
        return 1 + len(self.peers) + len(self.shapes) * (present + len(self.ms)) + 6 * self.extras


def measure(options: Options, say: Say, total: Callable[[int], None]) -> dict:
    """Run everything; `say` is told each step, `total` the number of steps as soon as it is known."""
    torch.set_num_threads(options.threads)
    missing = _missing(options, say)
    entrants = [*our_contestants(options.formats, options.computes, options.dtype), *peers.TORCH]
    entrants += [peer for peer in options.peers if peer.name not in missing]
    total(options.steps(len(entrants)))
    with torch.inference_mode():
        say("measuring the machine's limits")
        limits, _ = machine.try_roofline(options.threads)
        record = machine.provenance(options.threads) | _settings(options)
        if any(entrant in ggml.CONTESTANTS for entrant in entrants):
            record["versions"] |= ggml.versions()
        results = []
        neighbours = Neighbours()
        for shape in options.shapes:
            results += measure_shape(shape, entrants, options.ms, options.threads, options.pace, say)
        limits, note = machine.try_roofline(options.threads, before=limits)
        record |= {"roofline": machine.as_dict(limits), "roofline_note": note, "missing_peers": missing}
        record["others_share"] = neighbours.share()
        record["results"] = [asdict(with_limits(r, limits)) for r in results]
        if options.extras and options.formats:
            record |= measure_extras(options.dtype, options.threads, say)
    record["goals"] = judge_all(record)
    return record


def _settings(options: Options) -> dict:
    return {"dtype": options.dtype, "pace": asdict(options.pace), "rotation_bytes": rotation_bytes()}


def _missing(options: Options, say: Say) -> dict[str, str]:
    """Peers that cannot be measured, with the reason."""
    missing: dict[str, str] = {}
    for peer in options.peers:
        say(f"trying {peer.name}")
        if reason := peers.why_not(peer, options.threads):
            missing[peer.name] = reason
    return missing


def measure_extras(dtype: str, threads: int, say: Say) -> dict[str, list[dict]]:
    """Cliff, call overhead and memory, for int4 and int8 weights."""
    shape = parse_shapes(SHAPE)[0]
    found: dict[str, list[dict]] = {"cliff": [], "overhead": [], "memory": [], "faults": []}
    for format, compute in CLIFF_CASES:
        try:
            found["cliff"].append(asdict(measure_cliff(format, compute, dtype, shape, threads, say=say)))
            say(f"overhead and memory: {format}")
            found["overhead"].append(asdict(measure_overhead(format, compute, dtype)))
            found["memory"].append(asdict(measure_memory(format, compute, dtype, shape)))
        except Exception as error:  # reported in red; the results so far are kept
            found["faults"].append({"contestant": f"qkernels {format} {compute}", "reason": f"{type(error).__name__}: {error}"})
    return found
