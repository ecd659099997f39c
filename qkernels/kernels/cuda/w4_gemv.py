"""A few rows of 16-bit activations against codes of 4 and 8 bits, from Turing on: csrc/cuda/w4_gemv.cu over triton/layout.py's layout.

The weight is the left operand of a warp's products, unpacked in registers; eight rows of x are the right one's columns. More rows are
multiplied eight by eight: each time the weight is read again. How K is cut depends on the weight's shape and the GPU alone, and a row's
result is the same whatever other rows there are.
A form whose blocks had 32 rows of the weight each ran on an H200, where no test of it failed; this one, whose blocks go on to others,
has not.

Source: weights as the left operand, Machete and humming; unpacking by magic numbers, FasterTransformer's. Written from scratch.
"""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from qkernels import formats, reference
from qkernels.errors import UnsupportedError
from qkernels.formats import Int, QuantFormat
from qkernels.kernels import device as devices
from qkernels.kernels.cuda import library
from qkernels.kernels.registry import Matmul, Problem, register
from qkernels.kernels.triton import f16_gemm, layout
from qkernels.kernels.triton.f16_format import Stored, constants, table
from qkernels.kernels.triton.launch import Gpu, check, gathered, gpu_of, over_rows, workspace
from qkernels.kernels.triton.layout import Packed

FEW = 8  # rows of x, a launch
ROWS, WARPS = 32, 8  # of a block
MOST_TILES = 32  # of a block: longer runs of K gain nothing
BESIDE = WARPS * 4 * FEW * (ROWS + 4) + 16 * FEW + 1024  # bytes of shared memory: of sums, between rows of x, of the driver
# Blocks for a processor, if there are so many parts of K: 4096 x 4096 took 6.3 us with 1.9, 7.4 with 1.0 and with 3.9, 6144 x 4096 6.2 with
# 1.5, 7.1 with 2.9, 8.2 with 5.8 (int4, one row of x, on an H200, in the form before).
BUSY = 1.4
KINDS = ("f32", "f16", "bf16", "e4m3", "e8m0")  # types of scales, as csrc/cuda/numbers.cuh counts them


def multiply(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias, M at most 8."""
    (m, k), n, device = x.shape, out.shape[1], x.device
    gpu, stream = gpu_of(device), torch._C._cuda_getCurrentRawStream(device.index)
    run = tiles_of_a_block(format, n, k, gpu)
    parts, counters = workspace(-(-stored.weight.shape[0] // run), m, n, -(-n // ROWS), device, stream)
    operands = (x, *stored, table(format.code, device), bias, out, parts, counters)
    how = (run, gpu.processors, gpu.shared_bytes, begins_early(device), stream)
    torch.ops.qkernels.w4_gemv.default(*operands, *numbers(format, n, k), *how)


def multiply_gated(
    x: Tensor,
    gate: Stored,
    gate_bias: Tensor | None,
    up: Stored,
    up_bias: Tensor | None,
    format: QuantFormat,
    out: Tensor,
) -> None:
    """out [M, N] = silu(x · Ĝᵀ + bias) · (x · Ûᵀ + bias), M at most 8: as one weight of 2 N rows."""
    (m, k), n, device = x.shape, out.shape[1], x.device
    gpu, stream = gpu_of(device), torch._C._cuda_getCurrentRawStream(device.index)
    run = tiles_of_a_block(format, 2 * n, k, gpu)
    parts, counters = workspace(-(-gate.weight.shape[0] // run), m, 2 * n, -(-2 * n // ROWS), device, stream)
    operands = (x, *gate, gate_bias, *up, up_bias, table(format.code, device), out, parts, counters)
    how = (run, gpu.processors, gpu.shared_bytes, begins_early(device), stream)
    torch.ops.qkernels.w4_swiglu.default(*operands, *numbers(format, n, k), *how)


@functools.lru_cache(maxsize=16)
def begins_early(device: torch.device) -> bool:
    """Whether a kernel can begin while the one before it ends."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)


@functools.lru_cache(maxsize=1024)
def numbers(format: QuantFormat, n: int, k: int) -> tuple[int, bool, int, int, int, int]:
    """What the op wants to know of a format: bits; whether the second half of its table is minus the first; type of the scales; zero of all
    codes; rows and tiles that share scales."""
    shared, code = constants(format, n, k), format.code
    mirrored = layout.is_table(code) and all(-a == b for a, b in zip(code.values[:8], code.values[8:]))
    zero = code.bias if isinstance(code, Int) else 0
    return format.bits, mirrored, KINDS.index(format.scale), zero, shared["GROUP_ROWS"], shared["GROUP_TILES"]


@functools.lru_cache(maxsize=1024)
def tiles_of_a_block(format: QuantFormat, n: int, k: int, gpu: Gpu) -> int:
    """Tiles along K that a block works through: of K's parts, alike and as few as keep all processors BUSY, one.

    Two blocks find room on a processor: for each of its tiles one has eight rows of x, and what 32 rows have of scales and zeros, twice.
    """
    tiles, columns = -(-k // layout.tile_columns(format)), layout.tile_columns(format)
    tile_bytes = 2 * FEW * columns + 2 * 4 * ROWS * scales_of_a_tile(format, n, k) * (1 if format.zero == "none" else 2)
    most = max(1, min(MOST_TILES, (gpu.shared_bytes // 2 - BESIDE) // tile_bytes) // WARPS)
    wanted = max(-(-tiles // (most * WARPS)), math.ceil(BUSY * gpu.processors / -(-n // ROWS)))
    return -(-tiles // (min(wanted, -(-tiles // WARPS)) * WARPS)) * WARPS


def scales_of_a_tile(format: QuantFormat, n: int, k: int) -> int:
    """Those that the kernel keeps of a row: it is compiled for 1, 4 and 8."""
    return {1: 1, 2: 4, 4: 4, 8: 8}[layout.groups_per_tile(format, n, k)]


def why_not_dtype(dtype: torch.dtype, sm: int) -> str | None:
    if dtype == torch.float32 or (dtype == torch.bfloat16 and sm < 80):
        return f"{str(dtype).removeprefix('torch.')} activations on sm{sm}; float16 is taken, from sm80 on bfloat16"
    return None


# -- the op and the kernel ------------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define(
    "cuda_f16_wN_gemv(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, Tensor? bias, str format, int n)"
    " -> Tensor"
)


def _run(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None, bias: Tensor | None, format: str, n: int
) -> Tensor:
    """x [..., K] -> [..., N]."""
    what, stored = formats.get(format), Stored(weight, scales, zeros, tensor_scale)
    check(x, weight, weight.shape[0] * layout.tile_columns(what))
    if reason := why_not_dtype(x.dtype, devices.current(x.device).sm):
        raise UnsupportedError("cuda_f16_wN_gemv cannot multiply", {"x.dtype": reason})

    def by_eights(rows: Tensor, out: Tensor) -> None:
        for few, part in zip(rows.split(FEW), out.split(FEW)):
            multiply(few, stored, bias, what, part)

    return over_rows(x, n, by_eights)


def _run_fake(x, weight, scales, zeros, tensor_scale, bias, format, n):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], n))


_LIBRARY.impl("cuda_f16_wN_gemv", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_f16_wN_gemv", _run_fake, lib=_LIBRARY)


_LIBRARY.define(
    "cuda_f16_wN_swiglu(Tensor x, Tensor gate, Tensor gate_scales, Tensor? gate_zeros, Tensor? gate_tensor_scale, Tensor? gate_bias,"
    " Tensor up, Tensor up_scales, Tensor? up_zeros, Tensor? up_tensor_scale, Tensor? up_bias, str format, int n) -> Tensor"
)


def _run_gated(
    x: Tensor,
    gate: Tensor,
    gate_scales: Tensor,
    gate_zeros: Tensor | None,
    gate_tensor_scale: Tensor | None,
    gate_bias: Tensor | None,
    up: Tensor,
    up_scales: Tensor,
    up_zeros: Tensor | None,
    up_tensor_scale: Tensor | None,
    up_bias: Tensor | None,
    format: str,
    n: int,
) -> Tensor:
    """x [..., K] -> [..., N]."""
    what = formats.get(format)
    of_gate, of_up = Stored(gate, gate_scales, gate_zeros, gate_tensor_scale), Stored(up, up_scales, up_zeros, up_tensor_scale)
    for weight in (gate, up):
        check(x, weight, weight.shape[0] * layout.tile_columns(what))
    if reason := why_not_dtype(x.dtype, devices.current(x.device).sm):
        raise UnsupportedError("cuda_f16_wN_swiglu cannot multiply", {"x.dtype": reason})

    def by_eights(rows: Tensor, out: Tensor) -> None:
        for few, part in zip(rows.split(FEW), out.split(FEW)):
            multiply_gated(few, of_gate, gate_bias, of_up, up_bias, what, part)

    return over_rows(x, n, by_eights)


def _run_gated_fake(x, *others):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], others[-1]))


_LIBRARY.impl("cuda_f16_wN_swiglu", _run_gated, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_f16_wN_swiglu", _run_gated_fake, lib=_LIBRARY)


def swiglu(x: Tensor, gate: Packed, gate_bias: Tensor | None, up: Packed, up_bias: Tensor | None) -> Tensor | None:
    """silu(x · Ĝᵀ + bias) · (x · Ûᵀ + bias), eight rows at a time."""
    odd = x.dtype == torch.float32 or gate.shape[0] % (ROWS // 2) or gate.perm is not None or up.perm is not None
    if odd or (gate_bias is not None and up_bias is not None and gate_bias.dtype != up_bias.dtype):
        return None
    op = torch.ops.qkernels.cuda_f16_wN_swiglu.default
    return op(x, *gate[2:6], gate_bias, *up[2:6], up_bias, gate.format.name, gate.shape[0])


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op, name, n = torch.ops.qkernels.cuda_f16_wN_gemv.default, format.name, shape[0]
    return gathered(lambda x, *tensors: op(x, *tensors, name, n))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def dequantize(packed: Packed) -> Tensor:
    """[N, K] float32, by torch: Triton has no Turing."""
    return reference.decode(layout.restore(packed))


def _why_not(p: Problem) -> str | None:
    if reason := library.why_not(p, "w4_gemv", 75) or layout.why_not_plain(p) or layout.why_not(p) or why_not_dtype(p.dtype, p.device.sm):
        return reason
    if p.format.bits not in (4, 8) or not (isinstance(p.format.code, Int) or layout.is_table(p.format.code)):
        return f"code {p.format.code.name}: integers of 4 and 8 bits and tables of 4 bits are taken"
    if not formats.is_known(p.format):
        return f"the name {p.format.name}, by which its op takes a format, finds another one or none: register the format"
    return None


def _cost(p: Problem) -> float:
    """More than that of other kernels for every eight rows: until it is measured, they are taken where they run."""
    return 1.3 * -(-p.rows // FEW) * f16_gemm.KERNEL.cost(replace(p, m=FEW))


KERNEL = register(
    replace(
        f16_gemm.KERNEL,
        name="cuda_f16_wN_gemv",
        backend="cuda",
        source=__doc__.rpartition("Source: ")[2],
        why_not=_why_not,
        cost=_cost,
        run=run,
        bind=bind,
        dequantize=dequantize,
        backward=None,
        swiglu=swiglu,
        batch_invariant=True,
    )
)
