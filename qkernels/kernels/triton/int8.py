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
    """What a product needs besides its tensors, once it has been worked out."""

    product: Product  # compiled
    grid: tuple[int, int, int]


_LAUNCHES: dict[tuple[Any, ...], Launch] = {}
_QUANTIZERS: dict[tuple[Any, ...], Any] = {}  # compiled


def usual(x: Tensor, *others: Tensor | None) -> bool:
    """Whether what was compiled for such tensors before does for these, too."""
    return x.is_cuda and regular(x, *others)


def quantize(x: Tensor, padded: int, early: bool) -> tuple[Tensor, Tensor]:
    """x [M, K] -> its codes, int8 [M, padded], and of every row the scale and the sum of codes, float32 [2, M].

    From arguments to a compiled kernel Triton takes longer than the kernel does; what it finds is kept, by all that it depends on.
    """
    (m, k), columns = x.shape, quantize_block(x.shape[1])
    codes = torch.empty((m, padded), dtype=torch.int8, device=x.device)
    rows = torch.empty((2, m), dtype=torch.float32, device=x.device)
    arguments = (x, codes, rows, m, k, padded, x.stride(0), columns, early)
    key = (k, padded, x.dtype, x.device, early)
    compiled = _QUANTIZERS.get(key) if usual(x) else None
    if compiled is not None:
        compiled[m, 1, 1](*arguments, stream=_stream(x))
        return codes, rows
    from qkernels.kernels.triton.jit.int8 import quantize_rows

    options = {"launch_pdl": True} if early else {}
    compiled = quantize_rows[m, 1, 1](*arguments, num_warps=min(8, columns // 1024 * 2), **options)
    if usual(x):
        remember(_QUANTIZERS, key, compiled)
    return codes, rows


def multiply(
    plan: Callable[[int], Product], what: Hashable, x: Tensor, stored: Stored, bias: Tensor | None, out: Tensor, padded: int
) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias, x as codes [M, padded]; `plan(m)` is asked once for all that is equal, `what` included."""
    (m, k), n = x.shape, out.shape[1]
    types = (x.dtype, stored.scales.dtype, stored.zeros is None, None if bias is None else bias.dtype)
    key, known = (what, n, k, m, types, x.device), usual(x, *stored, bias)
    launch = _LAUNCHES.get(key) if known else None
    product, grid = launch or _launch(plan(m), n, m)
    stream = _stream(x)
    parts, counters = workspace(product.tile.split_k, m, n, grid[0], x.device, stream)
    if parts is not None and product.exact:
        parts = parts.view(torch.int32)
    arguments = (*quantize(x, padded, product.tile.early), *stored, bias, out, parts, counters, m, n, padded, *product.values)
    if launch is not None:
        product.gemm[grid](*arguments, stream=stream)
        return
    t = product.tile
    options = {"launch_pdl": True} if t.early else {}
    compiled = product.gemm[grid](*arguments, num_warps=t.num_warps, num_stages=t.num_stages, **options)
    if known:
        remember(_LAUNCHES, key, Launch(product._replace(gemm=compiled), grid))


def _stream(x: Tensor) -> int:
    """The current one of x's device; the interpreter has none."""
    return torch._C._cuda_getCurrentRawStream(x.device.index) if x.is_cuda else 0


def _launch(product: Product, n: int, m: int) -> Launch:
    return Launch(product, (blocks(product.tile, n, m), product.tile.split_k, 1))
