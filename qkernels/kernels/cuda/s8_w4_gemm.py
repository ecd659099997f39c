"""Codes of 4 bits against int8 activations, on Hopper: csrc/cuda/s8_wgmma.cu from 65 rows on, over the layout of triton/s8_w4_gemm.py.

Weights become int8 in registers, from which the tensor core takes them. With one scale for a row sums are int32 to the end; with scales of
groups, multiples of 128 columns, those of 128 columns are, and float32 over these. Fewer rows, and many where groups have scales of their
own: the Triton kernel.

Source: weights from registers as in Machete and humming; subtracting under a guard bit, LiquidGEMM; stream-K, Osama et al. 2023. Written
from scratch.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkernels import formats
from qkernels.formats import QuantFormat
from qkernels.kernels.cuda import wgmma
from qkernels.kernels.registry import Matmul, Problem, register
from qkernels.kernels.triton import int8, s8_w4_gemm
from qkernels.kernels.triton.int8 import Stored
from qkernels.kernels.triton.launch import check, gathered, over_rows, regular
from qkernels.kernels.triton.s8_w4_gemm import Packed

TILES = (wgmma.Tile(128, step=0.5, whole=4, cut=8), wgmma.Tile(256, step=0.72, whole=3, cut=11))
TILES_OF_GROUPS = (wgmma.Tile(128, step=0.85, whole=4, cut=8),)
MANY = 512  # rows: beyond, scales of groups cost the Triton kernel less


def _run(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    """x [..., K] -> [..., N]."""
    tiles, n, row_bytes = weight.shape
    check(x, weight, 2 * tiles * row_bytes)
    what, stored = formats.get(format), Stored(weight, scales, zeros)
    return over_rows(x, n, lambda rows, out: multiply(rows, stored, bias, what, out))


def multiply(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias."""
    m, (steps, n, _), runs = x.shape[0], stored.weight.shape, stored.scales.shape[0]
    few_or_many = m <= wgmma.FEW or (runs > 1 and m > MANY)
    if few_or_many or x.dtype == torch.float32 or not regular(x, *stored, bias):
        return s8_w4_gemm.multiply(x, stored, bias, format, out)
    plan = wgmma.plan(TILES_OF_GROUPS if runs > 1 else TILES, n, m, steps, wgmma.gpu_of(x.device).processors)
    operands = (*int8.quantize(x, steps * wgmma.STEP, early=True), *stored, bias)
    shared = 1 << 30 if runs == 1 else format.group_extent(n, x.shape[1])[1] // wgmma.STEP  # steps that share a scale
    wgmma.launch(torch.ops.qkernels.s8_w4_wgmma.default, plan, operands, out, shared)
    return None


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define("cuda_s8_w4_gemm(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, str format) -> Tensor")


def _run_fake(x, weight, scales, zeros, bias, format):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


_LIBRARY.impl("cuda_s8_w4_gemm", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_s8_w4_gemm", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op, name = torch.ops.qkernels.cuda_s8_w4_gemm.default, format.name
    return gathered(lambda x, weight, scales, zeros, _, bias: op(x, weight, scales, zeros, bias, name))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def _why_not(p: Problem) -> str | None:
    if reason := wgmma.why_not(p) or s8_w4_gemm.KERNEL.why_not(p):
        return reason
    tile = s8_w4_gemm.tile_columns(p.format, p.n, p.k)
    return None if tile == wgmma.STEP else f"tiles of {tile} columns; groups of multiples of 128 columns, or the whole row, are taken"


KERNEL = register(
    replace(
        s8_w4_gemm.KERNEL,
        name="cuda_s8_w4_gemm",
        backend="cuda",
        source=__doc__.rpartition("Source: ")[2],
        why_not=_why_not,
        cost=lambda p: s8_w4_gemm.KERNEL.cost(p) - 0.1,  # with few rows it is the same kernel, with more of them a faster one
        run=run,
        bind=bind,
    )
)
