"""Codes of 8 bits with one scale a row against activations that are quantised to int8 on the fly: int8 tensor cores, exact sums.

One kernel gives every row of x codes -127…127 and a scale, the largest magnitude / 127; a second one multiplies. Both operands come from
shared memory, weights as the left one: tokens are the columns of a product, in multiples of 16. Sums are int32, so that neither a split of
K nor the order of arrival changes a result, and a row's result does not depend on the other rows.

    y[m, n] = (Σ xq · wq - zero[n] · Σ xq) · x_scale[m] · scale[n] + bias[n]

Layout: row after row, signed: the canonical code ^ 128; K is padded with zeros to whole tiles of 128, and so are the rows of x.

Source: scales of tokens and channels applied after the product as in LLM.int8() and SmoothQuant; grouped rasterisation from Triton's
tutorials. Written from scratch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.kernels.registry import Kernel, Matmul, Problem, register
from qkernels.kernels.triton import int8, tables
from qkernels.kernels.triton.int8 import OPTIONS, Tile, blocks
from qkernels.kernels.triton.launch import SPLITS, Gpu, check, gathered, gpu_of, over_rows, reserve, why_not

TILE_K = 128  # columns, and bytes: what a row of a tile in shared memory holds


class Packed(NamedTuple):
    """A weight as the int8 kernel reads it.

    Shapes, with K' = K rounded up to a multiple of 128:
        weight        [N, K']    int8     code - 128
        scales        [N]        float32, float16 or bfloat16
        zeros         [N]        uint8    canonical: of the codes before 128 was taken off
        tensor_scale  None
        perm          [K]        int32
    """

    format: QuantFormat
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None
    perm: Tensor | None


def prepare(q: QuantTensor) -> Packed:
    """Make canonical codes signed, and pad their rows; and what a launch keeps on the device, before any CUDA graph is made."""
    assert q.scales is not None
    if q.codes.is_cuda:
        reserve(q.codes.device)
    weight = F.pad((q.codes ^ 128).view(torch.int8), (0, -q.shape[1] % TILE_K))
    return Packed(q.format, q.shape, weight, q.scales.flatten(), None if q.zeros is None else q.zeros.flatten(), None, q.perm)


def restore(packed: Packed) -> QuantTensor:
    """Invert `prepare`, bit for bit."""
    format, (n, k), weight, scales, zeros, tensor_scale, perm = packed
    codes = weight[:, :k].view(torch.uint8) ^ 128
    return QuantTensor(format, (n, k), codes, scales.view(n, 1), None if zeros is None else zeros.view(n, 1), tensor_scale, perm)


def rows(packed: Packed, index: Tensor) -> QuantTensor:
    """Take rows [R] out, canonical, without the others."""
    zeros = None if packed.zeros is None else packed.zeros[index]
    return restore(
        packed._replace(shape=(len(index), packed.shape[1]), weight=packed.weight[index], scales=packed.scales[index], zeros=zeros)
    )


# -- tiles ----------------------------------------------------------------------------------------------------------------------------


def choose(n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """The tile for x [m, k] and a weight [n, k]: the best of a few on an H100 (benchmarks/NOTES.md).

    Few tokens: time goes into reading weights, by two blocks or more on every processor. Many: into products.
    """
    largest, large = Tile(128, 256, 8, raster=4), Tile(128, 128, 8, num_stages=3)
    if m <= 64:
        t = Tile(64, 16 if m <= 16 else 32 if m <= 32 else 64, 4, num_stages=6)
    elif blocks(largest, n, m) >= 16 * gpu.processors and largest.num_stages * stage_bytes(largest) <= gpu.shared_bytes:
        t = largest
    else:
        t = large if 4 * blocks(large, n, m) >= 3 * gpu.processors else Tile(64, 64, 4)
    wanted = round(2 * gpu.processors / blocks(t, n, m)) if m <= 64 else gpu.processors // blocks(t, n, m)
    stages = min(t.num_stages, gpu.shared_bytes // stage_bytes(t))
    split = max(s for s in SPLITS if s <= max(1, min(wanted, -(-k // TILE_K) // 2)))
    return t._replace(num_stages=stages, split_k=split, early=gpu.early)


def choose_for(n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """The tile that was found by tuning, or `choose`."""
    return tables.tile_for(KERNEL.name, choose(n, k, m, gpu), OPTIONS, gpu, "", n, k, m)


def stage_bytes(t: Tile) -> int:
    """Shared memory of one stage of the pipeline, with some for barriers."""
    return (t.block_n + t.block_m) * TILE_K + 128


# -- launching ------------------------------------------------------------------------------------------------------------------------


def _run(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None) -> Tensor:
    """x [..., K] -> [..., N]."""
    check(x, weight, weight.shape[1])
    return over_rows(x, weight.shape[0], lambda rows, out: multiply(rows, weight, scales, zeros, bias, out))


def multiply(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, out: Tensor, tile: Tile | None = None
) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias; a tile of one's own is for tuning."""
    (n, padded), k = weight.shape, x.shape[1]

    def plan(m: int) -> int8.Product:
        from qkernels.kernels.triton.jit.s8_gemm import gemm

        t = tile or choose_for(n, k, m, gpu_of(x.device))
        return int8.Product(gemm, tuple(tile_constants(t).values()), t, exact=True)

    int8.multiply(plan, ("s8_w8", tile), x, int8.Stored(weight, scales, zeros), bias, out, padded)


def tile_constants(t: Tile) -> dict[str, Any]:
    """The compile-time constants of `gemm`, in its order."""
    return {
        "BLOCK_N": t.block_n, "BLOCK_M": t.block_m, "BLOCK_K": TILE_K, "SPLIT_K": t.split_k, "RASTER": t.raster, "EARLY": t.early,
    }  # fmt: skip


# -- the op and the kernel ------------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define("triton_s8_gemm(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias) -> Tensor")


def _run_fake(x, weight, scales, zeros, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


_LIBRARY.impl("triton_s8_gemm", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::triton_s8_gemm", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op = torch.ops.qkernels.triton_s8_gemm.default
    return gathered(lambda x, weight, scales, zeros, _, bias: op(x, weight, scales, zeros, bias))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def dequantize(packed: Packed) -> Tensor:
    """[N, K] float32 from the packed form."""
    _, (_, k), weight, scales, zeros, _, perm = packed
    w = weight[:, :k].float()
    if zeros is not None:
        w -= zeros.float()[:, None] - 128
    w *= scales.float()[:, None]
    return w if perm is None else torch.empty_like(w).index_copy_(1, perm.long(), w)


def format_why_not(f: QuantFormat, n: int, k: int) -> str | None:
    if f.block is not None:
        return f"{f.name} keeps its blocks; 8-bit integers with one scale a row are taken"
    if not isinstance(f.code, Int) or f.bits != 8:
        return f"code {f.code.name} is no integer of 8 bits"
    if f.zero in ("float", "min") or (f.zero == "none" and f.code.bias != 128):
        return f"code {f.code.name} with zero {f.zero!r}: symmetric codes (u8b128) and integer zero points are taken"
    if f.group_extent(n, k) != (1, k):
        rows, columns = f.group_extent(n, k)
        return f"groups of {rows} x {columns}; one scale for every row of {k} is taken"
    if f.scale not in ("f32", "f16", "bf16") or f.tensor_scale:
        return f"scales of {f.scale}{' and one of the tensor' if f.tensor_scale else ''}; f32, f16 and bf16 alone are taken"
    most = (2**31 - 1) // (127 * (128 if f.zero == "none" else 255))
    return f"K = {k}: int32 holds the sums of at most {most} products" if k > most else None


def _cost(p: Problem) -> float:
    """Two launches, and reading at some 3 TB/s or multiplying at some 1200 TOP/s."""
    return 6.0 + max(p.format.nbytes(p.n, p.k) / 3e6, 2 * p.rows * p.n * p.k / 12e8)


KERNEL = register(
    Kernel(
        name="triton_s8_w8_gemm",
        backend="triton",
        source=__doc__.rpartition("Source: ")[2],
        compute="int8",
        why_not=lambda p: why_not(p) or format_why_not(p.format, p.n, p.k),
        cost=_cost,
        prepare=prepare,
        restore=restore,
        rows=rows,
        run=run,
        bind=bind,
        packed_type=Packed,
        dequantize=dequantize,
        batch_invariant=True,
    )
)
