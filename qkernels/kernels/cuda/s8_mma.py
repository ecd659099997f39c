"""What the kernels over csrc/cuda/s8_mma.cu share: which tile, whether tiles are cut along K, and the two launches. Triton has no part in
them; gradients are a matmul with the decoded weight.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from qkernels.kernels.triton.launch import counters_of

OPS = torch.ops.qkernels
STEP = 128  # columns
SHORTEST = 4  # steps of a block's part of a tile: fewer would not hide how long memory takes to answer
FULL = 0.85  # of the last wave: whole tiles, where it is as full as that
TOKENS = 1024  # of so many tiles are worked on side by side, for the cache's sake


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


class Plan(NamedTuple):
    """How a product is cut: the grid's blocks, and whether all tiles stay whole."""

    tile: Tile
    blocks: int
    whole: bool


@functools.lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_multiprocessor  # type: ignore[attr-defined]
    return Gpu(found.multi_processor_count, shared, early=found.major >= 9)


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
    """What an op of s8_mma.cu takes of a layer."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    bias: Tensor | None


def multiply(op: str, tiles: tuple[Tile, ...], x: Tensor, w: Weight, out: Tensor, steps: int, row_bytes: int, *more: int) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias, by an op of that name. row_bytes: of the weight in a step; `more`: the op's own numbers."""
    device, (m, n) = out.device, out.shape
    gpu, stream = gpu_of(device), stream_of(device)
    p = plan(tiles, n, m, steps, row_bytes, gpu)
    t = p.tile
    parts = None if p.whole else torch.empty(p.blocks * t.rows * t.tokens, dtype=torch.float32, device=device)
    how = (t.rows, t.tokens, p.blocks, max(1, TOKENS // t.tokens), p.whole, gpu.early, stream)
    getattr(OPS, op).default(*quantize(x, steps * STEP), *w, out, parts, counters_of(device, stream), *more, *how)


def stream_of(device: torch.device) -> int:
    """The current one."""
    return torch._C._cuda_getCurrentRawStream(device.index)
