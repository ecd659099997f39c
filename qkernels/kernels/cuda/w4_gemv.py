"""At most eight rows of fp16 and bf16 activations against codes of 4 and 8 bits: csrc/cuda/w4_gemv.cu, over triton/layout.py's layout.

How K is cut depends on the weight's shape and the GPU alone: a row's result is the same whatever other rows there are.
The kernel has not yet run on a GPU.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from qkernels.formats import Int, QuantFormat
from qkernels.kernels.cuda import library
from qkernels.kernels.registry import Problem
from qkernels.kernels.triton import layout
from qkernels.kernels.triton.f16_format import Stored, constants, table
from qkernels.kernels.triton.launch import Gpu, gpu_of, workspace

FEW = 8  # rows of x: more are not taken
ROWS, WARPS = 32, 8  # of a block
MOST_TILES = 32  # of a block: longer runs of K gain nothing
SCALES = ("f32", "f16", "bf16", "e4m3", "e8m0")  # in the order of Kind in csrc/cuda/numbers.cuh


def multiply(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias, M at most 8."""
    (m, k), n, device = x.shape, out.shape[1], x.device
    gpu, stream = gpu_of(device), torch._C._cuda_getCurrentRawStream(device.index)
    run = tiles_of_a_block(format, n, k, gpu)
    parts, counters = workspace(-(-stored.weight.shape[0] // run), m, n, -(-n // ROWS), device, stream)
    operands = (x, *stored, table(format.code, device), bias, out, parts, counters)
    torch.ops.qkernels.w4_gemv.default(*operands, *numbers(format, n, k), run, gpu.shared_bytes, gpu.early, stream)


@functools.lru_cache(maxsize=1024)
def numbers(format: QuantFormat, n: int, k: int) -> tuple[int, bool, int, int, int, int]:
    """What the op wants to know of a format: bits; whether the second half of its table is minus the first; type of the scales; zero of all
    codes; rows and tiles that share scales."""
    shared, code = constants(format, n, k), format.code
    mirrored = layout.is_table(code) and all(-a == b for a, b in zip(code.values[:8], code.values[8:]))
    zero = code.bias if isinstance(code, Int) else 0
    return format.bits, mirrored, SCALES.index(format.scale), zero, shared["GROUP_ROWS"], shared["GROUP_TILES"]


@functools.lru_cache(maxsize=1024)
def tiles_of_a_block(format: QuantFormat, n: int, k: int, gpu: Gpu) -> int:
    """Tiles along K that a block works through: some for every warp, and as many as leave two blocks to every processor.

    Two blocks find room on a processor, too: for each of its tiles one has eight rows of x, and what 32 rows have of scales and zeros.
    """
    tiles, columns = -(-k // layout.tile_columns(format)), layout.tile_columns(format)
    tile_bytes = 2 * FEW * columns + 4 * ROWS * scales_of_a_tile(format, n, k) * (1 if format.zero == "none" else 2)
    most = min(MOST_TILES, (gpu.shared_bytes // 2 - 16 * FEW) // tile_bytes)
    runs = range(max(1, most // WARPS) * WARPS, WARPS, -WARPS)
    return next((run for run in runs if -(-n // ROWS) * -(-tiles // run) >= 2 * gpu.processors), WARPS)


def scales_of_a_tile(format: QuantFormat, n: int, k: int) -> int:
    """Those that the kernel keeps of a row: it is compiled for 1, 4 and 8."""
    return {1: 1, 2: 4, 4: 4, 8: 8}[layout.groups_per_tile(format, n, k)]


def why_not(p: Problem) -> str | None:
    """What the kernel cannot do, whatever the number of rows; float32 activations are not its business either."""
    if reason := library.why_not(p, "w4_gemv", 75) or layout.why_not(p):
        return reason
    if p.dtype == torch.float32 or (p.dtype == torch.bfloat16 and p.device.sm < 80):
        return f"{p.dtype} activations; torch.float16 is taken, from sm80 on torch.bfloat16"
    if p.format.bits in (4, 8) and (isinstance(p.format.code, Int) or layout.is_table(p.format.code)):
        return None
    return f"code {p.format.code.name}: integers of 4 and 8 bits and tables of 4 bits are taken"
