"""The two CPU kernels over one packed layout: int8 activations (exact int32 sums in blocks of up to 256) and exact fp32.

Layout: see layout.py; arithmetic: csrc/cpu/multiply.h. Activations take -127…127, with integer codes of up to 4 bits -120…120. They have
a scale for every group of the weight's, but where groups have integer scales for all 256 columns of a block (csrc/cpu/scaled.h).
A result depends on K alone: not on the threads, nor on the other rows.

Source: interleaving output rows so that no sum crosses lanes, as in llama.cpp's repacked types; unsigned weights against signed
activations with a correction by the activations' sum, as VNNI libraries do; unpacking a panel once for many rows, as ik_llama.cpp does;
half the products for codes of up to 4 bits, as in S. Winograd, A New Algorithm for Inner Product, 1968; nested blocks: ggml-common.h.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from qkernels.formats import Int, QuantFormat
from qkernels.kernels.cpu import layout, library
from qkernels.kernels.cpu.layout import Packed, prepare, restore, rows
from qkernels.kernels.registry import Kernel, Matmul, Problem, register

# Reading in GB/s, then 10^9 operations a second with int8, fp32 and bf16 activations: what the kernels reached at M = 1 and M = 128 on two
# Zen4 cores with QKERNELS_ISA set to the level, and on two of a Xeon with AMX (benchmarks/NOTES.md). They rank kernels; other CPUs differ,
# but not in the order.
_RATES = {
    "portable": (12.0, 30.0, 13.0, 13.0),
    "avx2": (29.0, 420.0, 185.0, 185.0),
    "avx512vnni": (29.0, 790.0, 205.0, 205.0),
    "avx512bf16": (29.0, 925.0, 205.0, 420.0),
    "amx": (29.0, 2600.0, 205.0, 1500.0),
}


def _cost(p: Problem, int8: bool) -> float:
    read_gbs, int8_gops, fp32_gops, bf16_gops = _RATES[p.device.isa]
    gops = int8_gops if int8 else bf16_gops if p.dtype == torch.bfloat16 else fp32_gops
    return 2.0 + max(p.format.nbytes(p.n, p.k) / read_gbs, 2 * p.rows * p.n * p.k / gops) / 1e3


def _binder(name: str) -> Callable[[QuantFormat, tuple[int, int]], Matmul]:
    """The `bind` of a kernel, over the op of that name, which may be missing until then."""
    ops = torch.ops.qkernels

    def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
        op, n = getattr(ops, name).default, shape[0]
        table, code = layout.describe(format, *shape)

        def matmul(
            x: Tensor,
            weight: Tensor,
            scales: Tensor | None,
            zeros: Tensor | None,
            tensor_scale: Tensor | None,
            perm: Tensor | None,
            bias: Tensor | None,
        ) -> Tensor:
            return op(x, weight, scales, zeros, table, tensor_scale, perm, bias, n, *code)

        return matmul

    return bind


def dequantize(packed: Packed) -> Tensor:
    """[N, K] float32 from the packed form."""
    n, k = packed.shape
    table, code = layout.describe(packed.format, n, k)
    op = torch.ops.qkernels.cpu_dequantize.default
    weight = op(packed.weight, packed.scales, packed.zeros, table, packed.tensor_scale, n, k, *code)
    return weight if packed.perm is None else torch.empty_like(weight).index_copy_(1, packed.perm.long(), weight)


def _why_not_s8(p: Problem) -> str | None:
    if reason := layout.why_not(p):
        return reason
    code = p.format.code
    return None if isinstance(code, Int) or code.bits <= 4 else f"{code.name} values do not fit int8"


if library.why_missing() is None:

    @torch.library.register_fake("qkernels::cpu_linear_s8")
    @torch.library.register_fake("qkernels::cpu_linear_f32")
    def _(x, qweight, scales, zeros, table, tensor_scale, perm, bias, n, bits, group, code, offset, minima):  # type: ignore[no-untyped-def]
        return x.new_empty((*x.shape[:-1], n))

    @torch.library.register_fake("qkernels::cpu_dequantize")
    def _(qweight, scales, zeros, table, tensor_scale, n, k, bits, group, code, offset, minima):  # type: ignore[no-untyped-def]
        return qweight.new_empty((n, k), dtype=torch.float32)


_bind_s8, _bind_f32 = _binder("cpu_linear_s8"), _binder("cpu_linear_f32")

S8 = register(
    Kernel(
        name="cpu_s8_wN_dot",
        backend="cpu",
        source=__doc__.rpartition("Source: ")[2],
        compute="int8",
        why_not=_why_not_s8,
        cost=lambda p: _cost(p, int8=True),
        prepare=prepare,
        restore=restore,
        run=lambda x, packed, bias: _bind_s8(packed.format, packed.shape)(x, *packed[2:], bias),
        bind=_bind_s8,
        packed_type=Packed,
        dequantize=dequantize,
        rows=rows,
        batch_invariant=True,
    )
)

F32 = register(
    Kernel(
        name="cpu_f32_wN_dot",
        backend="cpu",
        source=__doc__.rpartition("Source: ")[2],
        compute="float",
        why_not=layout.why_not,
        cost=lambda p: _cost(p, int8=False) * 1.001,  # a tie goes to the fewer operations
        prepare=prepare,
        restore=restore,
        run=lambda x, packed, bias: _bind_f32(packed.format, packed.shape)(x, *packed[2:], bias),
        bind=_bind_f32,
        packed_type=Packed,
        dequantize=dequantize,
        rows=rows,
        batch_invariant=True,
    )
)
