"""The command `qkernels`: info, formats, explain, quantize, inspect, convert, bench, tune."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table
from typer.core import TyperGroup

import qkernels
from qkernels import config, formats, inspection, io, kernels
from qkernels.errors import FormatError, QKernelsError
from qkernels.integrations.transformers import quantize_directory
from qkernels.io import convert as convert_checkpoint
from qkernels.kernels import device as devices
from qkernels.kernels import registry
from qkernels.kernels.cpu import library
from qkernels.kernels.cuda import library as cuda_library


class _Group(TyperGroup):
    """Commands of which the errors that qkernels raises on purpose end in one line, and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except QKernelsError as error:
            Console(stderr=True).print(f"[red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
            raise typer.Exit(1) from None


app = typer.Typer(
    cls=_Group,
    help="Low-bit matmul kernels: what is here, what would run, and quantising a model.",
    no_args_is_help=True,
    add_completion=False,
)
console = Console()


def main() -> None:
    app()


@app.command()
def info() -> None:
    """Versions, backends, instruction sets, and why any is unavailable."""
    table = Table("what", "here", title=f"qkernels {qkernels.__version__}", title_justify="left")
    table.add_row("torch", f"{torch.__version__}, {torch.get_num_threads()} threads")
    table.add_row("cpu kernels", library.why_missing() or f"at level {library.level()}")
    for level in config.ISA_LEVELS if library.why_missing() is None else ():
        table.add_row(f"  {level}", "yes" if torch.ops.qkernels.cpu_has_level(level) else "not on this machine")
    table.add_row("cuda kernels", cuda_library.why_missing() or f"for compute capability {cuda_library.for_all()}")
    table.add_row("triton kernels", _gpus())
    table.add_row("QKERNELS_ISA", config.forced_isa() or "not set")
    console.print(table)


def _gpus() -> str:
    """The GPUs here and whether kernels run on them, or why there are none."""
    if not torch.cuda.is_available():
        return "no GPU that torch can use" if torch.version.cuda or torch.version.hip else "torch is built without CUDA"
    problems = {
        i: registry.Problem(formats.get("int4"), 4096, 4096, device=devices.current(f"cuda:{i}")) for i in range(torch.cuda.device_count())
    }
    why = {i: registry.get("triton_f16_wN_gemm").why_not(p) for i, p in problems.items()}
    return "; ".join(f"{torch.cuda.get_device_name(i)} ({problems[i].device}): {reason or 'yes'}" for i, reason in why.items())


@app.command(name="formats")
def list_formats() -> None:
    """Every registered format, and which kernels run it here: on the CPU, and on the GPU if there is one."""
    cpu = devices.current("cpu")
    gpu = devices.current("cuda") if torch.cuda.is_available() else cpu
    table = Table(Column("format", no_wrap=True), "short names", "bits / weight", *(k.name for k in kernels.all_kernels()))
    for f in formats.all_formats():
        short = ", ".join(alias for alias, name in formats.aliases().items() if name == f.name)
        here = {k.name: gpu if k.backend in ("triton", "cuda") else cpu for k in kernels.all_kernels()}
        able = ("yes" if k.why_not(registry.Problem(f, 4096, 4096, device=here[k.name])) is None else "-" for k in kernels.all_kernels())
        table.add_row(f.name, short, f"{f.bits_per_weight():.3f}", *able)
    console.print(table)


@app.command()
def explain(
    name: Annotated[str | None, typer.Argument(metavar="FORMAT", help="the format; --format means the same")] = None,
    format: str = "int4",
    device: str = "cpu",
    nk: Annotated[str, typer.Option(help="N x K")] = "4096x4096",
    m: Annotated[str, typer.Option(help="rows of x, separated by commas")] = "1,16,256",
    dtype: str = "bfloat16",
    compute: str = "auto",
    batch_invariant: bool = False,
) -> None:
    """Which kernel would run, what each would cost, and why the others cannot. Needs no such device."""
    n, k = _numbers(nk, "--nk", "x", 2)
    kind = next((known for known in registry.DTYPES if str(known) == f"torch.{dtype.removeprefix('torch.')}"), dtype)
    asked: dict[str, Any] = {"device": device, "dtype": kind, "compute": compute, "batch_invariant": batch_invariant}
    for rows in _numbers(m, "--m"):
        plan = qkernels.explain(name or format, (n, k), rows, **asked)
        console.print(str(plan), highlight=False, markup=False, soft_wrap=True)


@app.command()
def quantize(
    model_dir: Path,
    out_dir: Path,
    format: str = "int4",
    quantizer: str = "rtn",
    compute: str = "auto",
    include: Annotated[list[str] | None, typer.Option(help="glob of layers to take; may be repeated [default: all]")] = None,
    exclude: Annotated[list[str] | None, typer.Option(help="glob of layers to leave alone; may be repeated [default: lm_head]")] = None,
) -> None:
    """Quantise a transformers model directory, tensor by tensor, into one that `qkernels.load` reads."""
    globs = {"include": include or None, "exclude": exclude or ("lm_head",)}
    report = quantize_directory(model_dir, out_dir, format, quantizer=quantizer, compute=compute, **globs)  # type: ignore[arg-type]
    before, after = (sum(file.stat().st_size for file in d.glob("model*.safetensors")) / 1e6 for d in (model_dir, out_dir))
    console.print(f"{report}\n{model_dir}: {before:.1f} MB -> {out_dir}: {after:.1f} MB", highlight=False, markup=False, soft_wrap=True)


@app.command()
def inspect(path: Path) -> None:
    """What a checkpoint holds: layout, settings, and of each weight format, bits per weight, size, and the kernel that would run here."""
    summary = inspection.Summary(io.detect(path))
    first = Column("weight", overflow="fold")  # a name that is cut off names nothing
    table = Table(first, "format", "N x K", "bits / weight", "MB", "kernel here", title=str(path), title_justify="left")
    for row in summary.rows(devices.current("cpu")):
        table.add_row(*row)
    table.add_section()
    for row in summary.totals():
        table.add_row(*row)
    for line in summary.head():
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    console.print(table)
    for line in summary.notes:
        console.print(line, style="yellow", highlight=False, markup=False, soft_wrap=True)


@app.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SRC", help="a directory or file that `qkernels inspect` knows")],
    target: Annotated[Path, typer.Argument(metavar="DST", help="a new directory; a new file for gguf")],
    to: Annotated[str, typer.Option(help=", ".join((*convert_checkpoint.TARGETS, *convert_checkpoint.TARGETS_OF_MIXES)))],
    requantize: Annotated[bool, typer.Option("--requantize", help="round what the target cannot hold exactly")] = False,
) -> None:
    """Write a checkpoint in another layout: its numbers where that can hold them; where not, say so, or round them if asked to."""
    report = convert_checkpoint.convert(source, target, to, requantize=requantize)
    console.print(f"{report}\n{source} -> {target}", highlight=False, markup=False, soft_wrap=True)


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def bench(context: typer.Context) -> None:
    """Measure the kernels against torch, other libraries and the machine's limits; `bench --help` lists its options."""
    _benchmarks(context.args, "qkernels bench")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def tune(context: typer.Context) -> None:
    """Look for faster tiles of the GPU kernels, for this GPU and shapes of one's own; `tune --help` lists its options."""
    _benchmarks(["tune", *context.args], "qkernels")


def _benchmarks(arguments: list[str], name_shown: str) -> None:
    home, name = Path(qkernels.__file__).parent, "qkernels.benchmarks"
    if not (home / "benchmarks").is_dir():  # in a checkout, editably installed or not, it lies beside the package
        sys.path.insert(0, str(home.parent))
        name = "benchmarks"
    importlib.import_module(f"{name}.__main__").app(arguments, prog_name=name_shown)


def _numbers(text: str, option: str, separator: str = ",", count: int | None = None) -> list[int]:
    parts = text.lower().split(separator)
    if not all(part.strip().isdecimal() for part in parts) or (count is not None and len(parts) != count):
        raise FormatError(f"{option}={text!r} is not {count or 'a list of'} whole numbers; write 4096x4096 for --nk, 1,16,256 for --m")
    return [int(part) for part in parts]
