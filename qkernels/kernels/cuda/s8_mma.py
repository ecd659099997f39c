"""What the kernels over csrc/cuda/s8_mma.cu and s8_gemv.cu share: how a product is cut, and the two launches. Triton has no part in them;
gradients are a matmul with the decoded weight.

Up to eight rows go to s8_gemv.cu, whose dp4a needs no tensor core; on Turing, which has none for such products, more do eight by eight.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from qkernels.kernels.cuda import library
from qkernels.kernels.registry import Kernel, Problem
from qkernels.kernels.triton.launch import counters_of, workspace

OPS = torch.ops.qkernels
STEP = 128  # columns
SHORTEST = 4  # steps of a block's part of a tile: fewer would not hide how long memory takes to answer
FULL = 0.85  # of the last wave: whole tiles, where it is as full as that
TOKENS = 1024  # of so many tiles are worked on side by side, for the cache's sake
FEW = 8  # rows of x, of a launch of s8_gemv.cu
WARPS, MOST_COLUMNS = 8, 3072  # of its blocks, and what they keep of x at most: 24 KiB


class Tile(NamedTuple):
    """A size of tiles, of those that s8_mma.cu has, and how many blocks of a processor its registers allow."""

    rows: int
    tokens: int
    blocks: int


# Not measured. The narrowest that holds all tokens, as weights are then read once; with many tokens the one that reads the fewest bytes for
# its products. Blocks: as many as registers allow (`make cuda`), four at most.
TILES = (Tile(64, 16, 4), Tile(64, 32, 4), Tile(64, 64, 3), Tile(128, 128, 1))
TILES_OF_GROUPS = (Tile(64, 16, 4), Tile(64, 32, 4), Tile(64, 64, 2), Tile(128, 64, 1))


class Gpu(NamedTuple):
    """What a launch depends on."""

    processors: int
    shared_bytes: int  # of a processor
    early: bool  # whether a kernel can begin while the one before it ends
    mma: bool = True  # whether s8_mma.cu is for it: from Ampere on


class Plan(NamedTuple):
    """How a product is cut: the grid's blocks, and whether all tiles stay whole."""

    tile: Tile
    blocks: int
    whole: bool


@functools.lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor  # type: ignore[attr-defined]
    return Gpu(found.multi_processor_count, shared, early=found.major >= 9, mma=found.major >= 8)


def count(t: Tile, n: int, m: int) -> int:
    """Tiles of a result."""
    return -(-n // t.rows) * -(-m // t.tokens)


def shared_bytes(t: Tile, row_bytes: int) -> int:
    """Of a block: stages of STEP columns, of weights `row_bytes` a row; and what the driver takes."""
    stage = t.tokens * STEP + t.rows * row_bytes
    return (4 if stage <= 24 << 10 else 3) * stage + 1024


@functools.lru_cache(maxsize=8192)
def plan(tiles: tuple[Tile, ...], n: int, m: int, steps: int, row_bytes: int, gpu: Gpu) -> Plan:
    """How x [m, 128 steps] and a weight [n, ...] are cut."""
    *small, large = tiles
    busy = 4 * count(large, n, m) >= 3 * gpu.processors  # else there are too few of the large ones
    t = next((t for t in small if m <= t.tokens), large if busy else small[-1])
    blocks = gpu.processors * max(1, min(t.blocks, gpu.shared_bytes // shared_bytes(t, row_bytes)))
    of_all = count(t, n, m)
    whole = of_all >= blocks and of_all >= FULL * blocks * -(-of_all // blocks)
    return Plan(t, min(blocks, max(of_all, of_all * steps // SHORTEST)), whole)


def quantize(x: Tensor, padded: int) -> tuple[Tensor, Tensor]:
    """x [M, K] -> its codes, int8 [M, padded], and of every row the scale and the sum of codes, float32 [2, M]."""
    codes = torch.empty((x.shape[0], padded), dtype=torch.int8, device=x.device)
    rows = torch.empty((2, x.shape[0]), dtype=torch.float32, device=x.device)
    OPS.s8_quantize.default(x, codes, rows, gpu_of(x.device).early, stream_of(x.device))
    return codes, rows


class Weight(NamedTuple):
    """What the ops take of a layer."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None


class Shape(NamedTuple):
    """How a weight lies: the ops' name for it; tiles along K, columns of one; bytes of a row in 128 columns; numbers of the op's own."""

    kind: str  # w8 or w4
    tiles: int
    columns: int
    row_bytes: int
    more: tuple[int, ...] = ()

    @property
    def steps(self) -> int:
        return -(-self.tiles * self.columns // STEP)


def multiply(tiles: tuple[Tile, ...], x: Tensor, w: Weight, s: Shape, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias."""
    if len(x) > FEW and gpu_of(out.device).mma:
        return multiply_many(tiles, x, w, s, out)
    for rows, part in zip(x.split(FEW), out.split(FEW)):
        multiply_few(rows, w, s, part)
    return None


def multiply_many(tiles: tuple[Tile, ...], x: Tensor, w: Weight, s: Shape, out: Tensor) -> None:
    """By s8_mma.cu."""
    device, (m, n) = out.device, out.shape
    gpu, stream = gpu_of(device), stream_of(device)
    p = plan(tiles, n, m, s.steps, s.row_bytes, gpu)
    t = p.tile
    parts = None if p.whole else torch.empty(p.blocks * t.rows * t.tokens, dtype=torch.float32, device=device)
    how = (t.rows, t.tokens, p.blocks, max(1, TOKENS // t.tokens), p.whole, gpu.early, stream)
    op = getattr(OPS, f"s8_{s.kind}_mma").default
    op(*quantize(x, s.steps * STEP), *w, out, parts, counters_of(device, stream), *s.more, *how)


def multiply_few(x: Tensor, w: Weight, s: Shape, out: Tensor) -> None:
    """By s8_gemv.cu, M at most 8."""
    device, (m, n) = out.device, out.shape
    gpu, stream = gpu_of(device), stream_of(device)
    rows = rows_of_a_block(s.row_bytes, s.columns)
    run = tiles_of_a_block(rows, s.columns, n, s.tiles, gpu.processors)
    parts, counters = workspace(-(-s.tiles // run), m, n, -(-n // rows), device, stream)
    op = getattr(OPS, f"s8_{s.kind}_gemv").default
    op(*quantize(x, s.steps * STEP), *w, out, parts, counters, *s.more, run, gpu.early, stream)


def rows_of_a_block(row_bytes: int, columns: int) -> int:
    """Of s8_gemv.cu: those of which a warp loads 16 bytes a lane, four times, in a tile."""
    return 4 * 32 * 16 // (row_bytes * columns // STEP)


@functools.lru_cache(maxsize=1024)
def tiles_of_a_block(rows: int, columns: int, n: int, tiles: int, processors: int) -> int:
    """Of s8_gemv.cu, some for every warp. Whatever the number of rows of x, K is cut into parts that are alike, and as few as leave two
    blocks to every processor."""
    blocks = -(-n // rows)
    parts = max(-(-tiles * columns // MOST_COLUMNS), min(-(-2 * processors // blocks), -(-tiles // WARPS)))
    return -(-tiles // (parts * WARPS)) * WARPS


def why_not(p: Problem) -> str | None:
    """Why csrc/cuda/s8_gemv.cu, or s8_mma.cu where the GPU has its products, cannot run."""
    old = p.device.type == "cuda" and p.device.sm < 80
    return library.why_not(p, "s8_gemv", 75) or (None if old else library.why_not(p, "s8_mma", 80))


def cost(of_triton: Kernel, p: Problem) -> float:
    """Not measured: where Triton is, its kernel is taken; on Turing, float activations are."""
    if p.device.sm >= 80:
        return of_triton.cost(p) + 0.1
    return 1.3 * -(-p.rows // FEW) * of_triton.cost(replace(p, m=FEW))


def stream_of(device: torch.device) -> int:
    """The current one."""
    return torch._C._cuda_getCurrentRawStream(device.index)
