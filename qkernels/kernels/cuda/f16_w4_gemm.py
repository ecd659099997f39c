"""Codes of 4 bits against fp16 and bf16 activations, on Hopper: csrc/cuda/w4_wgmma.cu from 65 rows on, over triton/layout.py's layout.

The tensor core takes weights from registers, where they are unpacked and scaled while it multiplies the ones before. A grid, one block for
every processor, works through the tiles; what does not come out even is cut along K, and the parts are added in a fixed order. How depends
on the number of rows, and with it the order of float32 sums. Fewer rows, float32 activations, gradients: the Triton kernels, on the same
packed weight.

Source: unpacking by magic numbers, FasterTransformer's; weights from registers as in Machete and humming; stream-K, Osama et al. 2023.
Written from scratch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkernels import formats
from qkernels.formats import Int, QuantFormat
from qkernels.kernels.cuda import wgmma
from qkernels.kernels.registry import Matmul, Problem, register
from qkernels.kernels.triton import f16_gemm, layout
from qkernels.kernels.triton.f16_format import Stored, why_not_bias
from qkernels.kernels.triton.launch import check, gathered, over_rows, regular
from qkernels.kernels.triton.layout import Packed

TILES = (wgmma.Tile(128, step=0.85, whole=4, cut=8), wgmma.Tile(256, step=1.45, whole=3, cut=12))


def _run(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None, bias: Tensor | None, format: str, n: int
) -> Tensor:
    """x [..., K] -> [..., N]."""
    check(x, weight, weight.shape[0] * wgmma.STEP)
    what, stored = formats.get(format), Stored(weight, scales, zeros, tensor_scale)
    return over_rows(x, n, lambda rows, out: multiply(rows, stored, bias, what, out))


def multiply(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias."""
    (m, k), n = x.shape, out.shape[1]
    exact = x.dtype == torch.bfloat16 or (x.dtype == torch.float16 and format.scale == "f16")
    if m <= wgmma.FEW or not exact or not regular(x, *stored, bias):
        return f16_gemm.multiply(x, stored, bias, format, out)
    plan = wgmma.plan(TILES, n, m, stored.weight.shape[0], wgmma.gpu_of(x.device).processors)
    group = format.group_extent(n, k)[1]
    steps = 1 << 30 if group == k else max(1, group // wgmma.STEP)  # that share a scale
    wgmma.launch(torch.ops.qkernels.w4_wgmma.default, plan, (x, stored.weight, stored.scales, stored.zeros, bias), out, 8, steps)
    return None


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define(
    "cuda_f16_w4_gemm(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, Tensor? bias, str format, int n)"
    " -> Tensor"
)


def _run_fake(x, weight, scales, zeros, tensor_scale, bias, format, n):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], n))


_LIBRARY.impl("cuda_f16_w4_gemm", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_f16_w4_gemm", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op, name, n = torch.ops.qkernels.cuda_f16_w4_gemm.default, format.name, shape[0]
    return gathered(lambda x, *tensors: op(x, *tensors, name, n))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def _why_not(p: Problem) -> str | None:
    if reason := wgmma.why_not(p) or layout.why_not_plain(p) or f16_gemm.KERNEL.why_not(p) or why_not_bias(p.format):
        return reason
    f, group = p.format, p.format.group_extent(p.n, p.k)
    if not isinstance(f.code, Int) or f.bits != 4 or f.zero == "float":
        return f"code {f.code.name} with zero {f.zero!r}: integers of 4 bits, symmetric or with integer zero points, are taken"
    if group[1] < 32 and group[1] != p.k:
        return f"groups of {group[1]}; of 32 and more columns they are taken"
    if group[0] != 1 or f.scale not in ("f16", "bf16") or f.tensor_scale:
        scales = f"scales of {f.scale}{' and one of the tensor' if f.tensor_scale else ''} for {group[0]} x {group[1]} weights"
        return f"{scales}; f16 and bf16 alone, for groups within a row, are taken"
    return None if p.k % 8 == 0 else f"K = {p.k}: multiples of 8 are taken"


KERNEL = register(
    replace(
        f16_gemm.KERNEL,
        name="cuda_f16_w4_gemm",
        backend="cuda",
        source=__doc__.rpartition("Source: ")[2],
        why_not=_why_not,
        cost=lambda p: f16_gemm.KERNEL.cost(p) - 0.1,  # with few rows it is the same kernel, with more of them a faster one
        run=run,
        bind=bind,
    )
)
