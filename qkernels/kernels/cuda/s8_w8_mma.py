"""Codes of 8 bits with one scale a row against int8 activations, from Turing on, without Triton: csrc/cuda/s8_mma.cu and, up to
eight rows, s8_gemv.cu over the layout of triton/s8_gemm.py. As it is, not yet run on a GPU.

A launch gives every row of x codes and a scale (s8_quantize.cu), a second one multiplies; both operands come through shared memory in
stages. A grid of the blocks that fit on the GPU works through the tiles; what does not come out even is cut along K. Sums are int32:
neither that nor the other rows change a row's result.

Source: scales of tokens and channels applied after the product as in LLM.int8() and SmoothQuant; copies in stages as in CUTLASS; stream-K,
Osama et al. 2023. Written from scratch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkernels.formats import QuantFormat
from qkernels.kernels.cuda.s8_mma import STEP, TILES, Shape, Weight, cost, multiply, why_not
from qkernels.kernels.registry import Matmul, Problem, register
from qkernels.kernels.triton import s8_gemm
from qkernels.kernels.triton.launch import check, gathered, over_rows
from qkernels.kernels.triton.s8_gemm import Packed


def _run(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N]."""
    n, padded = weight.shape
    check(x, weight, padded)
    layer, shape = Weight(weight, scales, zeros, bias), Shape("w8", padded // STEP, STEP, STEP)
    return over_rows(x, n, lambda rows, out: multiply(TILES, rows, layer, shape, out))


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define("cuda_s8_w8_mma(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor")


def _run_fake(x, weight, scales, zeros, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("cuda_s8_w8_mma", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_s8_w8_mma", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op = torch.ops.qkernels.cuda_s8_w8_mma.default
    return gathered(lambda x, weight, scales, zeros, _, bias: op(x, weight, scales, zeros, bias))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def _why_not(p: Problem) -> str | None:
    return why_not(p) or s8_gemm.format_why_not(p.format, p.n, p.k)


KERNEL = register(
    replace(
        s8_gemm.KERNEL,
        name="cuda_s8_w8_mma",
        backend="cuda",
        source=__doc__.rpartition("Source: ")[2],
        why_not=_why_not,
        cost=lambda p: cost(s8_gemm.KERNEL, p),
        run=run,
        bind=bind,
    )
)
