"""Ŵ itself, or a part of it, from the packed layout; and with it products by torch's matmul, a slice of the weight at a time.

For many rows that costs less than the matmul gains over kernels that unpack weights again for every tile of tokens.
"""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor

from qkernels import formats
from qkernels.formats import QuantFormat
from qkernels.kernels.triton import layout
from qkernels.kernels.triton.f16_format import Stored, arithmetic, constants, table
from qkernels.kernels.triton.layout import Packed

SLICE_BYTES = 32 << 20  # of dequantised weight at a time: what the caches of large GPUs hold
BLOCK_N = 64


def dequantize_part(stored: Stored, format: QuantFormat, shape: tuple[int, int], row: int, tile: int, out: Tensor) -> None:
    """Fill `out` with the weight [N, K] from this row and this tile of columns on: as many as it has, or up to the last."""
    from qkernels.kernels.triton.jit import f16_gemm as jit

    (n, k), (rows, columns) = shape, out.shape
    exact = torch.float32 if layout.is_table(format.code) else torch.float16  # which holds all codes, but not all tables' values
    grid = (-(-rows // BLOCK_N), -(-columns // layout.tile_columns(format)))
    jit.dequantize[grid](
        *stored, table(format.code, out.device), out, row, tile, rows, n, k, columns,
        **constants(format, n, k), **arithmetic(format, exact, out.device), BLOCK_N=BLOCK_N, num_warps=4,
    )  # fmt: skip


def by_rows(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias: dequantise some rows of the weight, multiply, go on in the same memory."""
    k, n = x.shape[1], out.shape[1]
    rows = min(n, max(128, SLICE_BYTES // (k * x.itemsize) // 128 * 128))
    buffer = torch.empty((rows, k), dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        w = buffer[: min(rows, n - first)]
        dequantize_part(stored, format, (n, k), first, 0, w)
        part = slice(first, first + len(w))
        if bias is None:
            torch.mm(x, w.t(), out=out[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), x, w.t(), out=out[:, part])


def by_columns(grad: Tensor, stored: Stored, format: QuantFormat, out: Tensor) -> None:
    """out [M, K] = grad [M, N] · Ŵ, likewise by columns: every sum over N is torch's own, in one piece."""
    n, k = grad.shape[1], out.shape[1]
    tile_k = layout.tile_columns(format)
    tiles = max(1, SLICE_BYTES // (n * grad.itemsize * tile_k))
    buffer = torch.empty(n * min(k, tiles * tile_k), dtype=grad.dtype, device=grad.device)
    for tile in range(0, -(-k // tile_k), tiles):
        part = slice(tile * tile_k, min(k, (tile + tiles) * tile_k))
        w = buffer[: n * (part.stop - part.start)].view(n, -1)
        dequantize_part(stored, format, (n, k), 0, tile, w)
        torch.mm(grad, w, out=out[:, part])


def dequantize(packed: Packed) -> Tensor:
    """[N, K] float32 from the packed form."""
    format, (n, k), weight, scales, zeros, tensor_scale, perm = packed
    w = torch.ops.qkernels.triton_dequantize(weight, scales, zeros, tensor_scale, format.name, n, k)
    return w if perm is None else torch.empty_like(w).index_copy_(1, perm.long(), w)


def _dequantize(weight: Tensor, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None, format: str, n: int, k: int) -> Tensor:
    out = torch.empty((n, k), dtype=torch.float32, device=weight.device)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        dequantize_part(Stored(weight, scales, zeros, tensor_scale), formats.get(format), (n, k), 0, 0, out)
    return out


def _dequantize_fake(weight, scales, zeros, tensor_scale, format, n, k):  # type: ignore[no-untyped-def]
    return weight.new_empty((n, k), dtype=torch.float32)


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define("triton_dequantize(Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, str format, int n, int k) -> Tensor")
_LIBRARY.impl("triton_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::triton_dequantize", _dequantize_fake, lib=_LIBRARY)
