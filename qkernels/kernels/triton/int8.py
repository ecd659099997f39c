"""What the kernels with int8 activations share: how a problem is cut, and two launches: one quantises rows of x, one multiplies."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.kernels.triton.launch import SPLITS, regular, remember, workspace


class Tile(NamedTuple):
    """How one launch cuts its problem."""

    block_n: int
    block_m: int
    num_warps: int
    num_stages: int = 4
    split_k: int = 1
    raster: int = 8  # tiles of weights that are worked on side by side
    early: bool = False  # begins while the kernel before it ends


OPTIONS = {  # of each field: what `tune` tries, and tables may hold
    "block_n": (64, 128, 256), "block_m": (16, 32, 64, 128, 256), "num_warps": (4, 8), "num_stages": (2, 3, 4, 5, 6), "split_k": SPLITS,
    "raster": (1, 4, 8, 16), "early": (False, True),
}  # fmt: skip


def blocks(t: Tile, n: int, m: int) -> int:
    """Tiles of the output."""
    return -(-n // t.block_n) * -(-m // t.block_m)


def quantize_block(k: int) -> int:
    """Columns that the quantising kernel takes at a time, a power of two: each of its threads has 8 to 32."""
    return min(8192, max(1024, 1 << (k - 1).bit_length()))


class Stored(NamedTuple):
    """The tensors of a packed weight, but for the permutation."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None


class Product(NamedTuple):
    """How the second launch goes: a jit function, its compile-time constants, and whether parts of a split K are int32 or float32."""

    gemm: Any
    values: tuple[Any, ...]
    tile: Tile
    exact: bool


class Launch(NamedTuple):
    """What a call needs besides its tensors, once it has been worked out: the two kernels and their compile-time constants."""

    quantize: Any
    quantize_values: tuple[Any, ...]
    product: Product  # compiled
    grid: tuple[int, int, int]


_LAUNCHES: dict[tuple[Any, ...], Launch] = {}


def multiply(
    plan: Callable[[int], Product], what: Hashable, x: Tensor, stored: Stored, bias: Tensor | None, out: Tensor, padded: int
) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias, x as codes [M, padded]; `plan(m)` is asked once for all that is equal, `what` included.

    From arguments to a compiled kernel Triton takes longer than most products do; what it finds is kept, by all that it depends on.
    """
    (m, k), n = x.shape, out.shape[1]
    types = (x.dtype, stored.scales.dtype, stored.zeros is None, None if bias is None else bias.dtype)
    key = (what, n, k, m, types, x.device)
    launch = _LAUNCHES.get(key) if regular(x, *stored, bias) else None
    if launch is None:
        return _first_launch(plan(m), key, x, stored, bias, out, padded)
    stream, product = torch._C._cuda_getCurrentRawStream(x.device.index), launch.product
    codes, rows, parts, counters = _buffers(product, m, n, padded, launch.grid[0], x.device, stream)
    launch.quantize[m, 1, 1](x, codes, rows, m, k, padded, k, *launch.quantize_values, stream=stream)
    arguments = (codes, rows, *stored, bias, out, parts, counters, m, n, padded)
    product.gemm[launch.grid](*arguments, *product.values, stream=stream)
    return None


def _first_launch(product: Product, key: tuple[Any, ...], x: Tensor, stored: Stored, bias: Tensor | None, out: Tensor, padded: int) -> None:
    """Compile and launch; keep what was worked out, if the arguments are as they usually are."""
    from qkernels.kernels.triton.jit.int8 import quantize_rows

    (m, k), n, t = x.shape, out.shape[1], product.tile
    grid = (blocks(t, n, m), t.split_k, 1)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    codes, rows, parts, counters = _buffers(product, m, n, padded, grid[0], x.device, stream)
    options = {"launch_pdl": True} if t.early else {}
    columns = quantize_block(k)
    values = (columns, t.early)
    first = quantize_rows[m, 1, 1](x, codes, rows, m, k, padded, x.stride(0), *values, num_warps=min(8, columns // 1024 * 2), **options)
    arguments = (codes, rows, *stored, bias, out, parts, counters, m, n, padded)
    second = product.gemm[grid](*arguments, *product.values, num_warps=t.num_warps, num_stages=t.num_stages, **options)
    if x.is_cuda and regular(x, *stored, bias):
        remember(_LAUNCHES, key, Launch(first, values, product._replace(gemm=second), grid))


def _buffers(
    product: Product, m: int, n: int, padded: int, tiles: int, device: torch.device, stream: int
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Codes of x, its scales and sums, and where the parts of a split K meet."""
    codes = torch.empty((m, padded), dtype=torch.int8, device=device)
    rows = torch.empty((2, m), dtype=torch.float32, device=device)
    parts, counters = workspace(product.tile.split_k, m, n, tiles, device, stream)
    return codes, rows, parts.view(torch.int32) if parts is not None and product.exact else parts, counters
