"""`python -m benchmarks ggml`: our kernels against ggml's on the same bytes, and int4 as GPTQ and AWQ leave it against plain int4."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial

import torch
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn

from . import machine, peers, report
from .base import CheckFailed, Contestant, Prepared
from .goals import GGML_GOALS, INT4, LIKE_INT4, TORCH, find, judge_all, over_best
from .neighbours import Neighbours
from .ours import DTYPES, contestant, of_weight
from .peers import ggml
from .readme import goals_table, head, table
from .run import Say, measure_shape, rotation_bytes, with_limits
from .shapes import LayerShape
from .timing import Pace

SECTION = "ggml"  # of the README
OURS = {"mxfp4": "ggml_mxfp4"}  # where a type's name here is another one


@dataclass(frozen=True)
class Options:
    """What to measure; `types` may be empty: then only what stands beside int4 is."""

    types: list[str]
    shape: LayerShape
    ms: list[int]
    threads: int
    pace: Pace = field(default_factory=Pace)


def ours(type: str, dtype: str = "bfloat16") -> Contestant:
    """Our int8 kernel on the blocks that ggml made. Raises CheckFailed where they do not mean to us what they mean to ggml."""

    def layer(weight: Tensor) -> nn.Module:
        import qkernels

        raw, shape = ggml.blocks(weight, type), (weight.shape[0], weight.shape[1])
        q = qkernels.formats.QuantTensor(qkernels.formats.get(OURS.get(type, type)), shape, raw)
        if not torch.equal(qkernels.reference.decode(q), ggml.meaning(raw, type, shape[1])):
            raise CheckFailed(f"the blocks of {type} mean something else to ggml")
        return qkernels.QuantLinear.from_quant_tensor(q, compute="int8", dtype=DTYPES[dtype])

    def prepare(weight: Tensor, threads: int) -> Prepared:  # both are charged with the bytes of the file, however a kernel lays them out
        return replace(made.prepare(weight, threads), nbytes=ggml.blocks(weight, type).nbytes)

    made = of_weight(type, layer, "int8", dtype)
    return replace(made, prepare=prepare)


def permuted(dtype: str = "bfloat16") -> Contestant:
    """int4 whose groups are runs of a permutation of K, as GPTQ with act-order leaves it."""

    def layer(weight: Tensor) -> nn.Module:
        import qkernels

        perm = torch.randperm(weight.shape[1], generator=torch.Generator().manual_seed(2))
        q = qkernels.reference.permuted(qkernels.quantize(weight[:, perm], "int4"), perm)
        return qkernels.QuantLinear.from_quant_tensor(q, compute="int8", dtype=DTYPES[dtype])

    return of_weight("int4 perm", layer, "int8", dtype)


def cases(types: Sequence[str]) -> list[list[Contestant]]:
    """Who is measured with whom: for each type torch, ours, and ggml in each of its buffers; at last int4 in three forms."""
    torch_bf16 = peers.TORCH[0]
    of_types = [[torch_bf16, ours(type), *(ggml.contestant(type, buffer) for buffer in ggml.BUFFERS)] for type in types]
    return [*of_types, [torch_bf16, contestant("int4", "int8", "bfloat16"), contestant("int4_asym", "int8", "bfloat16"), permuted()]]


def measure(options: Options, say: Say, total: Callable[[int], None]) -> dict:
    """Measure all types, each with its own weights in memory, as one JSON-able record. Without ggml, only int4."""
    missing = peers.why_not(ggml.CONTESTANTS[0], options.threads)
    groups = cases([] if missing else options.types)
    total(1 + sum(len(group) + len(options.ms) for group in groups))
    with torch.inference_mode():
        say("measuring the machine's limits")
        limits, _ = machine.try_roofline(options.threads)
        record = machine.provenance(options.threads) | {"pace": asdict(options.pace), "rotation_bytes": rotation_bytes()}
        record["missing_peers"] = {"ggml": missing} if missing else {}
        neighbours, results = Neighbours(), []
        for group in groups:
            results += measure_shape(options.shape, group, options.ms, options.threads, options.pace, say)
        limits, note = machine.try_roofline(options.threads, before=limits)
    record |= {"roofline": machine.as_dict(limits), "roofline_note": note, "others_share": neighbours.share()}
    if not missing:
        record["versions"] |= ggml.versions()
    record["results"] = [asdict(with_limits(result, limits)) for result in results]
    return record | {"goals": judge_all(record, GGML_GOALS)}


def markdown(records: list[dict]) -> str:
    """The README's section, and what the command prints at last."""
    return "\n\n".join("\n\n".join([head(r), *filter(None, [report.noise_line(r)]), *tables(r), goals_table(r)]) for r in records)


def show(record: dict, console: Console) -> None:
    """Print what went wrong, then the tables."""
    for row in (r for r in record["results"] if not r["ok"] and not r["skipped"]):
        console.print(f"[red]{row['contestant']} M={row['m']}: {escape(row['reason'])}[/]", highlight=False)
    for name, reason in record["missing_peers"].items():
        console.print(f"[yellow]{name}[/]: {escape(reason)}", highlight=False)
    console.print(markdown([record]), highlight=False, markup=False, soft_wrap=True)


def tables(record: dict) -> list[str]:
    """Type by type, and int4's forms: one column for each M."""
    rows = record["results"]
    ms, shape = sorted({r["m"] for r in rows}), rows[0]["shape"]
    types = [t for t in ggml.TYPES if any(r["contestant"] == f"qkernels {t} int8" for r in rows)]
    cell: Callable[[str, int], str] = partial(_cell, record, shape)
    found = []
    if types:
        title = f"{shape.replace('x', '×')}: µs, × over ggml, × over bf16"
        body = [[type, _read_share(record, shape, type), *(cell(type, m) for m in ms), _best(record, shape, type)] for type in types]
        found.append(table([title, "M=1 of reading", *(f"M={m}" for m in ms), "ggml's fastest at M=" + str(ms[-1])], body))
    body = [[text, *(_over_int4(record, shape, weights, m) for m in ms)] for weights, text in LIKE_INT4.items()]
    return [*found, table(["Time over symmetric int4", *(f"M={m}" for m in ms)], body)]


def _cell(record: dict, shape: str, type: str, m: int) -> str:
    row = find(record, f"qkernels {type} int8", m, shape)
    if row is None:
        return "–"
    over = over_best(row["contestant"], f"ggml {type} ", m, shape)(record), row["times_over"].get(TORCH)
    return ", ".join([f"{row['timing']['median_us']:.0f}", *("–" if times is None else f"{times:.2f} ×" for times in over)])


def _read_share(record: dict, shape: str, type: str) -> str:
    share = (find(record, f"qkernels {type} int8", 1, shape) or {}).get("read_share")
    return "–" if share is None else f"{100 * share:.0f} %"


def _best(record: dict, shape: str, type: str) -> str:
    """ggml's fastest buffer at the largest M, and its time."""
    rows = [r for r in record["results"] if r["contestant"].startswith(f"ggml {type} ") and r["shape"] == shape and r["ok"]]
    last = [r for r in rows if r["m"] == max(r["m"] for r in rows)]
    best = min(last, key=lambda r: r["timing"]["median_us"], default=None)
    return "–" if best is None else f"{best['kernel']}, {best['timing']['median_us']:.0f} µs"


def _over_int4(record: dict, shape: str, weights: str, m: int) -> str:
    row = find(record, f"qkernels {weights} int8", m, shape)
    times = None if row is None else row["times_over"].get(INT4)
    return "–" if times is None else f"{1 / times:.2f} ×"
