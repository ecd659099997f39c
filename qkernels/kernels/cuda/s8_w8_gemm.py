"""Codes of 8 bits with one scale a row against int8 activations, on Hopper: csrc/cuda/s8_wgmma.cu from 65 rows on, over the layout of
triton/s8_gemm.py.

Both operands come to shared memory by the copy engine, and a grid of one block for every processor works through the tiles; what does not
come out even is cut along K. Sums are int32: neither that nor the other rows change a row's result. Fewer rows: the Triton kernel.

Source: scales of tokens and channels applied after the product as in LLM.int8() and SmoothQuant; stream-K, Osama et al. 2023. Written from
scratch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkernels.formats import QuantFormat
from qkernels.kernels.cuda import wgmma
from qkernels.kernels.registry import Matmul, Problem, register
from qkernels.kernels.triton import int8, s8_gemm
from qkernels.kernels.triton.launch import check, gathered, over_rows, regular
from qkernels.kernels.triton.s8_gemm import Packed

TILES = (wgmma.Tile(128, step=0.5, whole=4, cut=8), wgmma.Tile(256, step=0.85, whole=3, cut=11))


def _run(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N]."""
    check(x, weight, weight.shape[1])
    return over_rows(x, weight.shape[0], lambda rows, out: multiply(rows, weight, scales, zeros, bias, out))


def multiply(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias."""
    m, (n, padded) = x.shape[0], weight.shape
    if m <= wgmma.FEW or x.dtype == torch.float32 or not regular(x, weight, scales, zeros, bias):
        return s8_gemm.multiply(x, weight, scales, zeros, bias, out)
    plan = wgmma.plan(TILES, n, m, padded // wgmma.STEP, wgmma.gpu_of(x.device).processors)
    operands = (*int8.quantize(x, padded, early=True), weight, scales, zeros, bias)
    wgmma.launch(torch.ops.qkernels.s8_w8_wgmma.default, plan, operands, out)
    return None


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define("cuda_s8_w8_gemm(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor")


def _run_fake(x, weight, scales, zeros, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("cuda_s8_w8_gemm", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_s8_w8_gemm", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op = torch.ops.qkernels.cuda_s8_w8_gemm.default
    return gathered(lambda x, weight, scales, zeros, _, bias: op(x, weight, scales, zeros, bias))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def _why_not(p: Problem) -> str | None:
    return wgmma.why_not(p) or s8_gemm.KERNEL.why_not(p)


KERNEL = register(
    replace(
        s8_gemm.KERNEL,
        name="cuda_s8_w8_gemm",
        backend="cuda",
        source=__doc__.rpartition("Source: ")[2],
        why_not=_why_not,
        cost=lambda p: s8_gemm.KERNEL.cost(p) - 0.1,  # with few rows it is the same kernel, with more of them a faster one
        run=run,
        bind=bind,
    )
)
