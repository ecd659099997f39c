"""Codes of 4 bits against int8 activations, from Turing on, without Triton: csrc/cuda/s8_mma.cu and, up to eight rows, s8_gemv.cu
over the layout of triton/s8_w4_gemm.py. As it is, not yet run on a GPU.

A launch gives every row of x codes and a scale (s8_quantize.cu), a second one multiplies: weights become int8 in registers, on their way
to the tensor core, or to dp4a. With one scale for a row sums are int32 to the end: neither the other rows of x nor how K is cut
change a result. With scales of groups the sums of a group, or of 128 columns of it, are, and float32 over these, added in an order that
the shapes and the GPU decide.

Source: scales of tokens applied after the product as in SmoothQuant; copies in stages as in CUTLASS and Marlin; subtracting under a guard
bit, LiquidGEMM; stream-K, Osama et al. 2023. Written from scratch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkernels import formats
from qkernels.formats import QuantFormat
from qkernels.kernels.cuda.s8_mma import STEP, TILES, TILES_OF_GROUPS, Shape, Weight, cost, multiply, why_not
from qkernels.kernels.registry import Matmul, Problem, register
from qkernels.kernels.triton import s8_w4_gemm
from qkernels.kernels.triton.launch import check, gathered, over_rows
from qkernels.kernels.triton.s8_w4_gemm import Packed


def _run(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    """x [..., K] -> [..., N]."""
    count, n, row_bytes = weight.shape
    columns = 2 * row_bytes  # of a tile
    check(x, weight, count * columns)
    layer, whole = Weight(weight, scales, zeros, bias), len(scales) == 1 and columns == STEP
    shared = max(1, formats.get(format).group_extent(n, x.shape[-1])[1] // columns)
    shape = Shape("w4", count, columns, STEP // 2, (shared,))
    return over_rows(x, n, lambda rows, out: multiply(TILES if whole else TILES_OF_GROUPS, rows, layer, shape, out))


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define("cuda_s8_w4_mma(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, str format) -> Tensor")


def _run_fake(x, weight, scales, zeros, bias, format):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


_LIBRARY.impl("cuda_s8_w4_mma", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_s8_w4_mma", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op, name = torch.ops.qkernels.cuda_s8_w4_mma.default, format.name
    return gathered(lambda x, weight, scales, zeros, _, bias: op(x, weight, scales, zeros, bias, name))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def _why_not(p: Problem) -> str | None:
    return why_not(p) or s8_w4_gemm.format_why_not(p.format, p.n, p.k)


KERNEL = register(
    replace(
        s8_w4_gemm.KERNEL,
        name="cuda_s8_w4_mma",
        backend="cuda",
        source=__doc__.rpartition("Source: ")[2],
        why_not=_why_not,
        cost=lambda p: cost(s8_w4_gemm.KERNEL, p),
        run=run,
        bind=bind,
    )
)
