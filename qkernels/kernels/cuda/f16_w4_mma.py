"""Codes of 4 and 8 bits against fp16 and bf16 activations on Ampere and newer: csrc/cuda/w4_mma.cu over triton/layout.py's layout.

Up to eight rows go to w4_gemv.py's kernel. Of more, a warp unpacks and scales weights in registers, the left operand of its products; the
other is 16 to 128 tokens of a tile. Sums are float32; tiles that do not come out even are cut along K, and the parts are added in a fixed
order, so a result is the same on every run. How K is cut depends on the number of rows, but for `cuda_f16_w4_mma_invariant`, where N and
K alone decide. Triton is not needed: float32 activations and gradients go through its kernels where it is there, else through the decoded
weight and torch's matmul.
On an H200 a form that waited for scales at every step was half as fast as Triton, and no test of it failed; this one has not yet run on
a GPU.

Source: products, copies and fragment order as in Marlin; unpacking by magic numbers, FasterTransformer's; stream-K, Osama et al. 2023.
Written from scratch.
"""

from __future__ import annotations

import functools
import importlib.util
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import formats, reference
from qkernels.errors import UnsupportedError
from qkernels.formats import Int, QuantFormat
from qkernels.kernels.cuda import library, w4_gemv
from qkernels.kernels.cuda.w4_gemv import KINDS, begins_early
from qkernels.kernels.registry import Matmul, Problem, register
from qkernels.kernels.triton import f16_backward, f16_dequantize, f16_gemm, layout
from qkernels.kernels.triton.f16_format import Stored, constants, table, why_not_bias
from qkernels.kernels.triton.launch import check, counters_of, gathered, gpu_of, over_rows
from qkernels.kernels.triton.layout import Packed

SOURCE, OLDEST = "w4_mma", 80
ROWS = 128  # of the weight, in a tile
HAS_TRITON = importlib.util.find_spec("triton") is not None
ROWS_INVARIANT = 256  # of x, a launch where all tiles of tokens are cut alike: the parts of more would take too much memory


class Launch(NamedTuple):
    """A row of the table: up to so many rows of x, the tokens of a tile, and the blocks of a processor."""

    rows: int
    tokens: int
    blocks: int


# Not measured. Tokens: the fewest that hold all rows, as weights are unpacked again for every tile; from 64 on a warp reads each but half
# as often from shared memory. Blocks: as many as registers allow (`make cuda`).
MANY = 1 << 30
OF_INTEGERS = (Launch(16, 16, 3), Launch(32, 32, 2), Launch(64, 64, 2), Launch(MANY, 128, 2))
OF_OTHERS = (Launch(16, 16, 3), Launch(MANY, 64, 2))  # tables and 8 bits
LEAST_STEPS = 4  # of a block: parts of fewer cost more to add than they save
WHOLE = 0.9  # where that part of the blocks is busy in the last wave, too, no tile is cut


class Plan(NamedTuple):
    """How a product is cut: tokens of a tile, blocks of the grid, whether all tiles stay whole."""

    tokens: int
    blocks: int
    whole: bool


@functools.lru_cache(maxsize=8192)
def plan(launches: tuple[Launch, ...], n: int, m: int, steps: int, processors: int, invariant: bool = False) -> Plan:
    """How x [m, ...] and a weight [n, ...] of so many steps are multiplied; `invariant`: in the same way for all m, but for `tokens`."""
    row = next(row for row in launches if m <= row.rows)
    tiles = -(-n // ROWS) * (1 if invariant else -(-m // row.tokens))
    room = processors * (2 if invariant else row.blocks)
    waves = -(-tiles // room)
    if tiles / (waves * room) >= WHOLE:
        return Plan(row.tokens, min(room, tiles), True)
    blocks = min(room, max(1, tiles * steps // LEAST_STEPS))
    return Plan(row.tokens, blocks, False)


@functools.lru_cache(maxsize=1024)
def numbers(format: QuantFormat, n: int, k: int) -> tuple[int, int, int, int, int]:
    """What csrc/cuda/w4_mma.cu wants to know: bits, type of the scales, the zero point of all codes, steps and rows that share a scale."""
    zero, shared = format.code.bias if isinstance(format.code, Int) else 0, constants(format, n, k)
    return format.bits, KINDS.index(format.scale), zero, shared["GROUP_TILES"], shared["GROUP_ROWS"]


def aligned(x: Tensor) -> Tensor:
    """x [M, K] with rows of whole 16 bytes, at multiples of 16; zeros fill them up."""
    if x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.data_ptr() % 16 == 0:
        return x
    return F.pad(x, (0, -x.shape[1] % 8)) if x.shape[1] % 8 else x.clone(memory_format=torch.contiguous_format)


def _run(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    n: int,
    batch_invariant: bool = False,
) -> Tensor:
    """x [..., K] -> [..., N]."""
    what, stored = formats.get(format), Stored(weight, scales, zeros, tensor_scale)
    check(x, weight, weight.shape[0] * layout.tile_columns(what))
    if batch_invariant and x.dtype == torch.float32:
        raise UnsupportedError(
            "no kernel multiplies float32 activations batch-invariantly on a GPU", {"x.dtype": "give bfloat16 or float16"}
        )
    return over_rows(x, n, lambda rows, out: multiply(rows, stored, bias, what, out, batch_invariant))


def multiply(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor, invariant: bool = False) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias."""
    if x.dtype == torch.float32:
        return decoded(x, stored, bias, format, out)
    if invariant:
        for rows, part in zip(x.split(ROWS_INVARIANT), out.split(ROWS_INVARIANT)):
            tiled(rows, stored, bias, format, part, True)
        return None
    if x.shape[0] <= w4_gemv.FEW:
        return w4_gemv.multiply(x, stored, bias, format, out)
    return tiled(x, stored, bias, format, out, False)


def tiled(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor, invariant: bool) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias by csrc/cuda/w4_mma.cu."""
    (m, k), n, device, gpu = x.shape, out.shape[1], x.device, gpu_of(x.device)
    launches = OF_INTEGERS if format.bits == 4 and isinstance(format.code, Int) else OF_OTHERS
    p, stream = plan(launches, n, m, stored.weight.shape[0], gpu.processors, invariant), torch._C._cuda_getCurrentRawStream(device.index)
    blocks = p.blocks * (-(-m // p.tokens) if invariant else 1)
    parts = None if p.whole else torch.empty(blocks * ROWS * p.tokens, dtype=torch.float32, device=device)
    operands = (aligned(x), *stored, table(format.code, device), bias, out, parts, counters_of(device, stream))
    raster = max(1, 1024 // p.tokens)
    how = (p.tokens, p.blocks, raster, p.whole, invariant, begins_early(device), stream)
    torch.ops.qkernels.w4_mma.default(*operands, *numbers(format, n, k), *how)


def decoded(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias by torch's matmul."""
    if HAS_TRITON:
        return f16_dequantize.by_rows(x, stored, bias, format, out)
    weight = dequantize(Packed(format, (out.shape[1], x.shape[1]), *stored, None)).to(x.dtype)
    out.copy_(F.linear(x, weight, None if bias is None else bias.to(x.dtype)))
    return None


def dequantize(packed: Packed) -> Tensor:
    """[N, K] float32 from the packed form."""
    return f16_dequantize.dequantize(packed) if HAS_TRITON else reference.decode(layout.restore(packed))


def backward(grad: Tensor, packed: Packed) -> Tensor:
    """grad_y [..., N] -> grad_x [..., K]."""
    return f16_backward.backward(grad, packed) if HAS_TRITON else grad @ dequantize(packed).to(grad.dtype)


_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define(
    "cuda_f16_w4_mma(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, Tensor? bias, str format, int n"
    ", bool batch_invariant=False) -> Tensor"
)


def _run_fake(x, weight, scales, zeros, tensor_scale, bias, format, n, batch_invariant=False):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], n))


_LIBRARY.impl("cuda_f16_w4_mma", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::cuda_f16_w4_mma", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int], batch_invariant: bool = False) -> Matmul:
    op, name, n = torch.ops.qkernels.cuda_f16_w4_mma.default, format.name, shape[0]
    return gathered(lambda x, *tensors: op(x, *tensors, name, n, batch_invariant))


def run(x: Tensor, packed: Packed, bias: Tensor | None, batch_invariant: bool = False) -> Tensor:
    return bind(packed.format, packed.shape, batch_invariant)(x, *packed[2:], bias)


def swiglu(x: Tensor, gate: Packed, gate_bias: Tensor | None, up: Packed, up_bias: Tensor | None) -> Tensor | None:
    """Up to eight rows in one launch; more want the tensor core twice."""
    few = x.numel() <= w4_gemv.FEW * x.shape[-1]
    return w4_gemv.swiglu(x, gate, gate_bias, up, up_bias) if few else None


def _why_not(p: Problem) -> str | None:
    if reason := library.why_not(p, SOURCE, OLDEST) or layout.why_not_plain(p) or f16_gemm.why_not_format(p) or why_not_bias(p.format):
        return reason
    f = p.format
    if f.bits not in (4, 8) or not (isinstance(f.code, Int) or layout.is_table(f.code)):
        return f"code {f.code.name}: integers of 4 and 8 bits and tables of 4 bits are taken"
    return None


def _why_not_invariant(p: Problem) -> str | None:
    return f16_gemm.FLOAT32 if p.dtype == torch.float32 else _why_not(p)


KERNEL = register(
    replace(
        f16_gemm.KERNEL,
        name="cuda_f16_w4_mma",
        backend="cuda",
        source=__doc__.rpartition("Source: ")[2],
        why_not=_why_not,
        cost=lambda p: f16_gemm.KERNEL.cost(p) + 0.1,  # until it is measured, Triton's kernel is taken where there is one
        run=run,
        bind=bind,
        dequantize=dequantize,
        backward=backward,
        swiglu=swiglu,
    )
)
INVARIANT = register(
    replace(
        KERNEL,
        name="cuda_f16_w4_mma_invariant",
        why_not=_why_not_invariant,
        cost=lambda p: f16_gemm.INVARIANT.cost(p) + 0.1,
        run=functools.partial(run, batch_invariant=True),
        bind=functools.partial(bind, batch_invariant=True),
        swiglu=None,
        batch_invariant=True,
    )
)
