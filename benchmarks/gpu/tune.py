"""Look for tiles faster than a kernel's own choice: `python -m benchmarks tune`, or `qkernels tune`.

From the kernel's choice on, one field after the other is tried at all its values, and the best kept, until no field helps. What can come
next is compiled by other processes, all of it at a time: that takes longer than the rest. Every tile is timed in a CUDA graph over weights
that rotate, and its result compared with that of the first, which was held against the reference. What was found is timed once more in
turns with the kernel's choice, and goes into the table if it is still the faster one.
"""

from __future__ import annotations

import datetime
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qkernels import config, formats, quantize, reference
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.kernels import device
from qkernels.kernels.registry import Kernel, Problem, why_not
from qkernels.kernels.triton import f16_gemm, int8, launch, layout, s8_gemm, s8_w4_gemm, tables
from qkernels.kernels.triton.f16_format import Stored
from qkernels.testing import assert_matmul_close

from ..base import CheckFailed
from ..check import rows_to_check
from ..ours import DTYPES
from ..run import first_line
from .compilers import Case, Compilers
from .device import Gpu
from .shapes import parse_shapes
from .timing import rotation_bytes

Tile = Any  # a NamedTuple in the kernel's own file
GAIN = 0.98  # of the time: what a tile has to beat to take another's place
CALLS, REPLAYS, TURNS = 40, 5, 7
SAME = 1e-5  # NMSE between two ways of cutting one product: roundings of the output


@dataclass(frozen=True)
class Tunable:
    """A kernel whose tiles are looked for.

    choose   (format, n, k, m, gpu) -> the tile without tables
    run      (x, packed, out, tile)
    """

    kernel: Kernel
    options: Mapping[str, tuple[Any, ...]]
    choose: Callable[[QuantFormat, int, int, int, launch.Gpu], Tile]
    run: Callable[[Tensor, Any, Tensor, Tile], None]
    by_format: bool = True  # whether a tile depends on the format


TUNABLE = (
    Tunable(
        f16_gemm.KERNEL,
        f16_gemm.OPTIONS,
        f16_gemm.choose_by_shape,
        lambda x, packed, out, tile: f16_gemm.fused(x, Stored(*packed[2:6]), None, packed.format, out, tile),
    ),
    Tunable(
        s8_gemm.KERNEL,
        int8.OPTIONS,
        lambda format, n, k, m, gpu: s8_gemm.choose(n, k, m, gpu),
        lambda x, packed, out, tile: s8_gemm.multiply(x, *packed[2:5], None, out, tile),
        by_format=False,
    ),
    Tunable(
        s8_w4_gemm.KERNEL,
        int8.OPTIONS,
        s8_w4_gemm.choose_by_shape,
        lambda x, packed, out, tile: s8_w4_gemm.multiply(x, int8.Stored(*packed[2:5]), None, packed.format, out, tile),
    ),
)


def tunable(compute: str, format: str, shapes: Sequence[tuple[int, int]]) -> Tunable:
    """The kernel that has the arithmetic. Raises ValueError where none takes the format at all of the shapes."""
    here = device.current("cuda") if torch.cuda.is_available() else device.parse("cuda:sm90")
    reasons = []
    for t in TUNABLE:
        problems = [Problem(formats.get(format), n, k, device=here) for n, k in shapes]
        found = [f"{t.kernel.name} at {p.n}x{p.k}: {reason}" for p in problems if (reason := why_not(t.kernel, p))]
        if t.kernel.compute == compute and not found:
            return t
        reasons += found[:1] if t.kernel.compute == compute else []
    raise ValueError(f"no kernel with compute={compute!r} takes {format}: {'; '.join(reasons) or 'float and int8 are known'}")


def cases(
    shapes: str, rows: Sequence[str], format: str, compute: str, dtype: str
) -> tuple[list[tuple[int, int, int]], Tunable, torch.dtype]:
    """Check what was asked for. Raises: ValueError."""
    if dtype not in DTYPES or dtype == "float32":
        raise ValueError(f"unknown dtype {dtype!r}; known: bfloat16, float16")
    ms = [int(m) for m in rows]
    if not ms or min(ms) < 1:
        raise ValueError(f"every M is at least 1, not {', '.join(rows) or 'nothing'}")
    found = [(s.n, s.k) for s in parse_shapes(shapes)]
    return [(n, k, m) for n, k in found for m in ms], tunable(compute, format, found), DTYPES[dtype]


def table_path(gpu: Gpu, folder: Path | None) -> Path:
    """Of this GPU's table; by default where the kernels look for it."""
    return (folder or config.tables_folder()) / tables.file_name(gpu.properties()["name"])


def keep(path: Path, row: tables.Row, gpu: Gpu) -> None:
    """Write a row at once: a search takes long, and may be stopped."""
    about = {"gpu": gpu.properties()["name"], "command": " ".join(["qkernels", *sys.argv[1:]]), "date": f"{datetime.date.today()}"}
    tables.write(path, [row], **about)


def search(
    start: Tile,
    options: Mapping[str, Sequence[Any]],
    time_us: Callable[[Tile], float],
    soon: Callable[[list[Tile]], object] = lambda _: None,
) -> Tile:
    """The fastest tile that changes of one field at a time lead to. `time_us` is asked once for each, `soon` told before."""
    times, best, before, told = {start: time_us(start)}, start, None, None
    while best != before:
        before = best
        for field, values in options.items():
            if told != best:
                near = {best._replace(**{field: value}) for field, values in options.items() for value in values}
                soon(sorted(near - times.keys()))
                told = best
            for value in values:
                tile = best._replace(**{field: value})
                if tile not in times:
                    times[tile] = time_us(tile)
                if times[tile] < GAIN * times[best]:
                    best = tile
    return best


class Trial:
    """One product: copies of a weight, activations, and the result that every tile has to have."""

    def __init__(
        self, gpu: Gpu, what: Tunable, format: QuantFormat, n: int, k: int, m: int, dtype: torch.dtype, compilers: Compilers | None = None
    ) -> None:
        """Raises: CheckFailed, when the kernel's own choice is wrong."""
        self.gpu, self.what, self.format, self.shape, self.m = gpu, what, format, (n, k), m
        self._case, self._compilers = Case(what.kernel.name, format.name, n, k, m, dtype), compilers
        q = quantize(torch.randn(n, k), format).to(gpu.device)
        copies = max(2, math.ceil(rotation_bytes(gpu.properties()["l2_bytes"]) / format.nbytes(n, k)))
        self._packed = [what.kernel.prepare(_copy(q)) for _ in range(copies)]
        self._x = torch.randn(m, k, device=gpu.device).to(dtype)
        self._out = torch.empty(m, n, dtype=dtype, device=gpu.device)
        self.here = launch.gpu_of(gpu.device)
        self.start = what.choose(format, n, k, m, self.here)
        self._expected = self._run(self.start).clone()
        _check(self._x, self._expected, q, what.kernel)

    def _run(self, tile: Tile) -> Tensor:
        self._out.fill_(float("nan"))
        self.what.run(self._x, self._packed[0], self._out, tile)
        return self._out

    def graph(self, tile: Tile) -> tuple[Callable[[], object], int]:
        """A graph of calls over all copies, and how many. Raises: CheckFailed, for a result that differs; what Triton raises."""
        y = self._run(tile).float()
        error = ((y - self._expected.float()).square().mean() / self._expected.float().square().mean()).item()
        if not error <= SAME:
            raise CheckFailed(f"{tile} computes something else than {self.start}: NMSE {error:.2g}")
        turns = math.ceil(CALLS / len(self._packed))
        calls = [lambda packed=packed: self._call(packed, tile) for packed in self._packed] * turns
        return self.gpu.capture(calls).replay, len(calls)

    def _call(self, packed: Any, tile: Tile) -> Tensor:
        self.what.run(self._x, packed, self._out, tile)
        return self._out

    def time_us(self, tile: Tile) -> float:
        """Of a call; infinite where the tile does not fit, in memory or in the problem."""
        if not self.fits(tile):
            return math.inf
        try:
            replay, calls = self.graph(tile)
            return min(self.gpu.times_us([replay] * (1 + REPLAYS))[1:]) / calls
        except CheckFailed:
            raise
        except Exception as error:
            self.gpu.examine(str(tile), first_line(error))
            if self.gpu.lost:
                raise
            return math.inf
        finally:
            self.gpu.free()

    def fits(self, tile: Tile) -> bool:
        """Whether a tile is worth compiling: no wider than the problem, sums in half of the registers, parts of two steps of K or more."""
        steps = -(-self.shape[1] // layout.tile_columns(self.format))
        sums = tile.block_n * tile.block_m / (32 * tile.num_warps)
        return (
            (tile.block_m < 2 * max(self.m, 16))
            and sums <= 128
            and tile.split_k <= max(1, steps // 2)
            and (self.here.early or not tile.early)
            and tile.num_warps * 16 <= max(64, tile.block_n)
        )

    def compile(self, tiles: list[Tile]) -> None:
        """Those that fit, by other processes."""
        if self._compilers is not None:
            self._compilers.compile(self._case, [tile for tile in tiles if self.fits(tile)])

    def compare(self, tile: Tile) -> tuple[float, float]:
        """Median µs of the kernel's choice and of a tile, in turns."""
        graphs = [self.graph(t) for t in (self.start, tile)]
        times: list[list[float]] = [[], []]
        for turn in range(TURNS):
            for i in (0, 1) if turn % 2 else (1, 0):
                replay, calls = graphs[i]
                times[i].append(self.gpu.times_us([replay] * 2)[1] / calls)
        return statistics.median(times[0]), statistics.median(times[1])

    def row(self) -> tables.Row | None:
        """Search; what goes into the table, if anything was found."""
        best = search(self.start, self.what.options, self.time_us, self.compile)
        if best == self.start:
            return None
        chosen_us, us = self.compare(best)
        if us > GAIN * chosen_us:
            return None
        n, k = self.shape
        return {
            "kernel": self.what.kernel.name, "format": self.format.name if self.what.by_format else "", "n": n, "k": k, "m": self.m,
            "tile": best._asdict(), "us": round(us, 2), "chosen_us": round(chosen_us, 2),
        }  # fmt: skip


def _copy(q: QuantTensor) -> QuantTensor:
    return QuantTensor.from_tensors(q.format, q.shape, {name: t.clone() for name, t in q.tensors().items()})


def _check(x: Tensor, y: Tensor, q: QuantTensor, kernel: Kernel) -> None:
    rows, int8 = rows_to_check(len(x)), q if kernel.compute == "int8" else None
    try:
        assert_matmul_close(y[rows], x[rows], reference.decode(q, torch.float64), int8=int8, act_group=None)
    except AssertionError as error:
        raise CheckFailed(f"{kernel.name}: {error}") from error


def tune(
    gpu: Gpu, what: Tunable, format: str, cases: Sequence[tuple[int, int, int]], dtype: torch.dtype, minutes: float
) -> Iterator[tuple[str, tables.Row | None]]:
    """For every case (n, k, m) what to say of it, and what goes into the table, if anything. No case is begun after so many minutes."""
    until, compilers = time.monotonic() + 60 * minutes, Compilers() if gpu.device.type == "cuda" else None
    for n, k, m in cases:
        if time.monotonic() > until:
            yield f"{n}x{k}, M = {m}: not tuned: {minutes:g} minutes are over", None
            continue
        try:
            row = Trial(gpu, what, formats.get(format), n, k, m, dtype, compilers).row()
            said = f"{row['chosen_us']} -> {row['us']} us  {row['tile']}" if row else "the kernel's choice stays"
        except Exception as error:  # another case may go well
            row, said = None, f"not tuned: {first_line(error)}"
        yield f"{n}x{k}, M = {m}: {said}", row
        gpu.free(collect=True)
        if gpu.lost:
            break
    if compilers is not None:
        compilers.close()
