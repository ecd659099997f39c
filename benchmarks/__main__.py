"""`python -m benchmarks` or `qkernels bench`: measure the machine, our kernels, torch and the peers; see NOTES.md for how."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from . import ggml as of_ggml
from . import machine, peers, plot, readme, report
from .cliff import measure_cliff
from .gpu.readme import markdown as gpu_markdown
from .ours import DTYPES
from .overhead import measure_memory, measure_overhead
from .peers import ggml
from .record import Options, measure
from .shapes import parse_shapes
from .timing import Pace

app = typer.Typer(help="Measure qkernels against torch, other libraries and the machine's limits.", add_completion=False)
console = Console(width=None if Console().is_terminal else 130)  # a file gets whole lines

ShapesOption = Annotated[str, typer.Option(help="Models or NxK, comma-separated: llama3-8b,4096x4096.")]
ThreadsOption = Annotated[int, typer.Option(help="Threads for all; 0 = as many as torch takes by itself.")]
FormatsOption = Annotated[str, typer.Option("--format", help="Weight formats, comma-separated; empty: only torch and the peers.")]
ComputesOption = Annotated[str, typer.Option("--compute", help="int8, float, auto; comma-separated.")]
OUT = "benchmarks/results of a checkout, else benchmarks-results in the current directory"
OutOption = Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False, writable=True, show_default=OUT)]
GpuOutOption = Annotated[
    Path, typer.Option(help="Folder of the results.", file_okay=False, writable=True, show_default="gpu, in that of the CPU's")
]
DtypeOption = Annotated[str, typer.Option(help="Activations of our layers: " + ", ".join(DTYPES) + ".")]
MsOption = Annotated[str, typer.Option("--m", help="Rows of activations, comma-separated.")]
RoundsOption = Annotated[int, typer.Option(help="Turns that each contestant gets per case.")]
SaveOption = Annotated[bool, typer.Option(help="Write the JSON and the pictures.")]


def split(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def thread_count(threads: int) -> int:
    """Set and return the number of threads."""
    torch.set_num_threads(threads or torch.get_num_threads())
    return torch.get_num_threads()


@contextmanager
def progress_bar():
    """Give (say, total): `say(text)` shows what is being done and moves the bar on."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True, refresh_per_second=2) as progress:
        task = progress.add_task("", total=None)

        def say(text: str) -> None:
            progress.update(task, description=text, advance=1, refresh=True)

        def total(steps: int) -> None:
            progress.update(task, total=steps)

        progress.live.auto_refresh = False
        yield say, total


@app.callback(invoke_without_command=True)
def run(
    context: typer.Context,
    shapes: ShapesOption = "4096x4096",
    m: MsOption = "1,16,128,512",
    formats: FormatsOption = "int4,int8",
    computes: ComputesOption = "int8,float",
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
    peer: Annotated[str, typer.Option("--peers", help="all, none, or beginnings of names: zentorch,openvino.")] = "all",
    rounds: RoundsOption = 10,
    extras: Annotated[bool, typer.Option(help="Also measure cliff, call overhead and memory.")] = True,
    name: Annotated[str, typer.Option(help="Name of the JSON; default: from the CPU's model.")] = "",
    out: OutOption = report.RESULTS,
    save: SaveOption = True,
) -> None:
    """Measure, print, and keep the results as JSON and pictures. Exit code 1 when a result of ours is wrong."""
    if context.invoked_subcommand is not None:
        return
    with usage_errors():
        rows, layer_shapes, others = [int(part) for part in split(m)], parse_shapes(shapes), peers.select(peer)
        if dtype not in DTYPES:
            raise ValueError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
        if save:
            out.mkdir(parents=True, exist_ok=True)  # before measuring: what cannot be kept is not worth the wait
    options = Options(
        layer_shapes, rows, split(formats), split(computes), dtype, thread_count(threads), others, extras, Pace(rounds=rounds)
    )
    with progress_bar() as (say, total):
        record = measure(options, say, total)
    report.show(record, console)
    if save:
        keep(record, out, name or machine.slug())
    if red := report.reds(record):
        console.print(f"[red]{len(red)} of our results are wrong: no speed is given for them[/]")
        raise typer.Exit(1)


@contextmanager
def usage_errors():
    """Show a wrong option as one line."""
    try:
        yield
    except (ValueError, OSError) as error:
        raise typer.BadParameter(str(error)) from error


def keep(record: dict, folder: Path, name: str, draw: Callable[[dict, Path, str], list[Path]] = plot.plot) -> None:
    """Write JSON and, where matplotlib is installed, pictures."""
    paths = [report.save(record, name, folder)]
    try:
        paths += draw(record, folder, name)
    except ImportError:
        console.print("no pictures: matplotlib is not installed (pip install 'qkernels[bench]')", markup=False, highlight=False)
    console.print(f"wrote {', '.join(path.name for path in paths)} in {folder}", markup=False, highlight=False, soft_wrap=True)


def each(formats: str, computes: str, threads: int, measure_one: Callable[[str, str, int], list[tuple[str, Any]]]) -> None:
    """Measure and print one line for every format and kind of arithmetic."""
    count = thread_count(threads)
    with torch.inference_mode():
        for format in split(formats):
            for compute in split(computes):
                for section, entry in measure_one(format, compute, count):
                    report.show_section(section, [asdict(entry)], console)


@app.command()
def cliff(
    shapes: ShapesOption = "4096x4096",
    formats: FormatsOption = "int4,int8",
    computes: ComputesOption = "int8",
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
) -> None:
    """Time M = 1…65 and find the worst step t(M+1)/t(M)."""
    shape = parse_shapes(shapes)[0]
    each(formats, computes, threads, lambda format, compute, count: [("cliff", measure_cliff(format, compute, dtype, shape, count))])


@app.command()
def overhead(
    shapes: ShapesOption = "4096x4096",
    formats: FormatsOption = "int4,int8",
    computes: ComputesOption = "int8",
    dtype: DtypeOption = "bfloat16",
    threads: ThreadsOption = 0,
) -> None:
    """Time the call of a 64×64 layer against F.linear, and count the bytes that a layer of the given shape holds."""
    shape = parse_shapes(shapes)[0]

    def both(format: str, compute: str, _: int):
        return [("overhead", measure_overhead(format, compute, dtype)), ("memory", measure_memory(format, compute, dtype, shape))]

    each(formats, computes, threads, both)


@app.command(name="ggml")
def against_ggml(
    types: Annotated[str, typer.Option(help="ggml's types, comma-separated; empty: int4's forms alone.")] = ",".join(ggml.TYPES),
    shapes: Annotated[str, typer.Option(help="NxK, one.")] = "4096x4096",
    m: MsOption = "1,16,128,512",
    threads: ThreadsOption = 0,
    rounds: RoundsOption = 8,
    name: Annotated[str, typer.Option(help="Name of the JSON; default: from the CPU's model.")] = "",
    out: Annotated[Path, typer.Option(help="Folder of the results.", file_okay=False, show_default="ggml, in that of the CPU's")] = (
        report.RESULTS / "ggml"
    ),
    save: SaveOption = True,
) -> None:
    """Measure against llama.cpp's kernels on the same bytes, and int4 with zero points or a permutation against plain int4."""
    with usage_errors():
        wanted, rows, (shape, *_) = split(types), [int(part) for part in split(m)], parse_shapes(shapes)
        if unknown := set(wanted) - set(ggml.TYPES):
            raise ValueError(f"unknown types {', '.join(sorted(unknown))}; known: {', '.join(ggml.TYPES)}")
        if save:
            out.mkdir(parents=True, exist_ok=True)
    with progress_bar() as (say, total):
        record = of_ggml.measure(of_ggml.Options(wanted, shape, rows, thread_count(threads), Pace(rounds=rounds)), say, total)
    if save:
        console.print(f"wrote {report.save(record, name or machine.slug(), out).name} in {out}", highlight=False, soft_wrap=True)
    of_ggml.show(record, console)
    if red := report.reds(record):
        console.print(f"[red]{len(red)} of our results are wrong: no speed is given for them[/]")
        raise typer.Exit(1)


@app.command()
def gpu(
    shapes: Annotated[str, typer.Option(help="8b, 70b, 70b-tp8, 8b-head, other models or NxK, comma-separated.")] = "8b,70b",
    m: MsOption = "1,2,4,8,16,32,64,128,256,1024,8192",
    formats: FormatsOption = "int4",
    computes: ComputesOption = "float,int8",
    dtype: Annotated[str, typer.Option(help="Activations of our layers: bfloat16, float16.")] = "bfloat16",
    peer: Annotated[str, typer.Option("--peers", help="all, none, or beginnings of names.")] = "all",
    minutes: Annotated[float, typer.Option(help="Time for all; what could not begin by then is listed.")] = 7,
    rounds: RoundsOption = 8,
    smoke: Annotated[bool, typer.Option(help="One small shape, three M and two rounds: does everything run?")] = False,
    name: Annotated[str, typer.Option(help="Name of the JSON; default: from the GPU's name.")] = "",
    out: GpuOutOption = report.RESULTS / "gpu",
    save: SaveOption = True,
) -> None:
    """Measure on a CUDA GPU, in graphs over rotating weights. Exit code 1 without one, and when a result of ours is wrong."""
    from .gpu import command
    from .gpu.plot import plot as draw

    with usage_errors():
        options = command.options(shapes, split(m), split(formats), split(computes), dtype, peer, minutes, rounds, smoke)
    try:
        device = command.Gpu()
    except command.NoDevice as error:
        console.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    with usage_errors():
        if save:
            out.mkdir(parents=True, exist_ok=True)
    name = name or command.name_of(device, smoke)
    record = command.measure(options, device, out if save else None, name, Console(width=None if console.is_terminal else command.WIDTH))
    if save:
        keep(record, out, name, draw)
    if reason := command.failed(record):
        console.print(f"[red]{reason}[/]")
        raise typer.Exit(1)


@app.command()
def tune(
    shapes: Annotated[str, typer.Option(help="8b, 70b, 70b-tp8, 8b-head, other models or NxK, comma-separated.")] = "8b",
    m: MsOption = "1,16,32,64,128,256,512,1024",
    format: Annotated[str, typer.Option(help="Weight format.")] = "int4",
    compute: Annotated[str, typer.Option(help="float or int8: which kernel.")] = "float",
    dtype: Annotated[str, typer.Option(help="Activations: bfloat16, float16.")] = "bfloat16",
    minutes: Annotated[float, typer.Option(help="No case is begun later.")] = 60,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the table.", show_default="QKERNELS_TABLES or ~/.cache/qkernels/tables")
    ] = None,
) -> None:
    """Look for faster tiles of the Triton kernels on this GPU, and write them to a table that they then take them from."""
    from .gpu import command, tune

    with usage_errors():
        cases, what, kind = tune.cases(shapes, split(m), format, compute, dtype)
    try:
        device = command.Gpu()
    except command.NoDevice as error:
        console.print(f"[red]{error}[/]", highlight=False, soft_wrap=True)
        raise typer.Exit(1) from error
    path, found = tune.table_path(device, out), 0
    for said, row in tune.tune(device, what, format, cases, kind, minutes):
        console.print(said, highlight=False, markup=False, soft_wrap=True)
        if row:
            tune.keep(path, row, device)
            found += 1
    console.print(f"{found} faster tiles in {path}" if found else "nothing faster was found", highlight=False, soft_wrap=True)


@app.command()
def static(write: Annotated[bool, typer.Option(help="Write results/static/*.md; else print.")] = False) -> None:
    """Table registers, shared memory and instructions of the GPU kernels: Triton's, compiled for GPUs that need not be here, and CUDA's."""
    from .gpu import static as of_triton
    from .gpu import static_cuda as of_cuda

    for name, module in (("triton", of_triton), ("cuda", of_cuda)):
        try:
            table = module.markdown()
        except FileNotFoundError as missing:
            console.print(f"[yellow]no table of the {name} kernels: {missing} is missing[/]", highlight=False, soft_wrap=True)
            continue
        if not write:
            print(table)
            continue
        path = report.RESULTS / "static" / f"{name}.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(table + "\n")


@app.command(name="readme")
def print_readme(
    write: Annotated[bool, typer.Option(help="Rewrite README.md between the markers.")] = False, out: OutOption = report.RESULTS
) -> None:
    """Print the README's benchmark sections from all results: the CPUs', those against ggml, and the GPUs'."""
    sections = {
        readme.CPU: readme.markdown(report.load_all(out)),
        of_ggml.SECTION: of_ggml.markdown(report.load_all(out / "ggml")),
        readme.GPU: gpu_markdown(report.load_all(out / "gpu")),
    }
    if write and not readme.README.exists():
        raise typer.BadParameter(f"--write: there is no {readme.README}; only a checkout of qkernels has one")
    text = readme.README.read_text() if write else ""
    for name, section in sections.items():
        if write:
            text = readme.replaced(text, section, name)
        else:
            print(section, end="\n\n")
    if write:
        readme.README.write_text(text)


if __name__ == "__main__":
    app()
