"""The gradient of x, in one kernel: grad_x = grad_y · Ŵ over the packed layout of layout.py.

Sums run over N, so a tile's weights are unpacked, scaled, rounded to the type of grad_y, and stored to shared memory: they are the right
operand of the tensor core, which does not take that from registers. Many rows go through torch's matmul, a slice of the weight's columns
at a time. Sums are float32; a split of N adds its parts in a fixed order.

Source: dequantising inside the backward's product as bitsandbytes' QLoRA does before it. Written from scratch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import formats
from qkernels.formats import QuantFormat
from qkernels.kernels.triton import layout
from qkernels.kernels.triton.f16_dequantize import by_columns
from qkernels.kernels.triton.f16_format import Stored, arithmetic, constants, rest_needed, table
from qkernels.kernels.triton.launch import SPLITS, Gpu, check, gpu_of, lanes_last, over_rows, workspace
from qkernels.kernels.triton.layout import Packed

TOKENS_FUSED = 65  # from here on, by slices of the weight


class Tile(NamedTuple):
    """How one launch cuts its problem; a tile of the result has the columns of one tile of the weight."""

    block_m: int
    block_n: int  # rows of the weight at a time
    num_warps: int = 4
    num_stages: int = 3
    split_n: int = 1
    raster: int = 8  # tiles of columns that are worked on side by side


def choose(n: int, k: int, m: int, tile_k: int, gpu: Gpu) -> Tile:
    """The tile for grad_y [m, n] and a weight [n, k]: two blocks on every processor, as in the forward's `choose`; not tuned."""
    if m <= 32:
        t = Tile(16 if m <= 16 else 32, 64)
    elif tile_k == 256:  # more columns, more sums: half as many to a thread
        t = Tile(64, 64, num_warps=8)
    else:
        t = Tile(64, 64) if m <= 64 else Tile(128, 64, num_warps=8)
    tiles = -(-k // tile_k) * -(-m // t.block_m)
    wanted = -(-2 * gpu.processors // tiles)
    split = max(s for s in SPLITS if s <= max(1, min(wanted, -(-n // t.block_n) // 2)))
    return t._replace(split_n=split)


def fused(grad: Tensor, stored: Stored, format: QuantFormat, out: Tensor, tile: Tile | None = None) -> None:
    """out [M, K] = grad [M, N] · Ŵ in one kernel; a tile of one's own is for tuning."""
    from qkernels.kernels.triton.jit import f16_backward as jit

    (m, n), k = grad.shape, out.shape[1]
    t = tile or choose(n, k, m, layout.tile_columns(format), gpu_of(grad.device))
    grid = (stored.weight.shape[0] * -(-m // t.block_m), t.split_n, 1)
    stream = torch.cuda.current_stream(grad.device).cuda_stream if grad.is_cuda else 0
    parts, counters = workspace(t.split_n, m, k, grid[0], grad.device, stream)
    jit.gemm[grid](
        grad, *stored, table(format.code, grad.device), out, parts, counters, m, n, k, grad.stride(0),
        **tile_constants(format, n, k, grad.dtype, grad.device, t), num_warps=t.num_warps, num_stages=t.num_stages,
    )  # fmt: skip


def tile_constants(format: QuantFormat, n: int, k: int, dtype: torch.dtype, device: torch.device, t: Tile) -> dict[str, Any]:
    """All compile-time constants of `gemm`."""
    return {
        **constants(format, n, k),
        **arithmetic(format, dtype, device),
        "REST": rest_needed(format, dtype),
        "BLOCK_N": t.block_n,
        "BLOCK_M": t.block_m,
        "SPLIT_N": t.split_n,
        "RASTER": t.raster,
        "LAST": lanes_last(),
    }


def _backward(
    grad: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None, format: str, n: int, k: int
) -> Tensor:
    """grad [..., N] -> [..., K]."""
    what, stored = formats.get(format), Stored(weight, scales, zeros, tensor_scale)
    check(grad, weight, n)

    def multiply(rows: Tensor, out: Tensor) -> None:
        by_slices = grad.dtype == torch.float32 or rows.shape[0] >= TOKENS_FUSED
        (by_columns if by_slices else fused)(rows, stored, what, out)

    return over_rows(grad, k, multiply)


def _backward_fake(grad, weight, scales, zeros, tensor_scale, format, n, k):  # type: ignore[no-untyped-def]
    return grad.new_empty((*grad.shape[:-1], k))


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define(
    "triton_f16_backward(Tensor grad, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, str format, int n, int k)"
    " -> Tensor"
)
_LIBRARY.impl("triton_f16_backward", _backward, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::triton_f16_backward", _backward_fake, lib=_LIBRARY)


def backward(grad: Tensor, packed: Packed) -> Tensor:
    """grad_y [..., N] -> grad_x [..., K]."""
    format, (n, k), weight, scales, zeros, tensor_scale, perm = packed
    out = torch.ops.qkernels.triton_f16_backward(grad, weight, scales, zeros, tensor_scale, format.name, n, k)
    return out if perm is None else torch.empty_like(out).index_copy_(-1, perm.long(), out)
