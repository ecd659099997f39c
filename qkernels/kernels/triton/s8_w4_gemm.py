"""Codes of 4 bits against activations that are quantised to int8 on the fly: int8 tensor cores, exact sums within a group.

One kernel gives every row of x codes -127…127 and a scale, the largest magnitude / 127; a second one multiplies. It makes int8 of the
weights in registers, two instructions for four of them, and hands them to the tensor core as its left operand: on Hopper it takes that from
registers. Tokens are the columns of a product, in multiples of 16. Sums are int32 within a group, or within 128 columns of a longer one,
and float32 over these; where a row has one scale they are int32 throughout.

    y[m, n] = x_scale[m] · Σ over groups g: scale[n, g] · (Σ xq · (code - zero)) + bias[n]

A row's result does not depend on the other rows where a row of the weight has one scale. Else it does through their number alone: parts of
a split K are added in a fixed order, but how many they are depends on M. Either way the same call gives the same bits.

Layout: tiles of T columns, 128 or the largest of 64 and 32 that divides a group; in each, every output row is T / 2 bytes, and the rows
follow each other. In what order: that of a tensor core's left operand, whose lane c of four holds columns 32 s + 16 h + 4 c + e of a row.

    column 32 s + 16 h + 4 c + e of a tile  ->  byte (T / 8) c + 4 s + e, nibble h        c, e < 4; h < 2; s < T / 32

Without zero points a nibble is code ^ 8, which is code - 8 in two's complement: in the upper half of a byte, and nothing in the lower one,
it is 16 (code - 8) as int8. With them it is the code. K is padded to whole tiles with nibbles of 0, and so are the rows of x.

Source: weights as the left operand from registers: Machete and humming; subtracting bytes under a guard bit: LiquidGEMM and humming; scales
of tokens after the product as in SmoothQuant. Written from scratch.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import formats
from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.packing import pack, unpack
from qkernels.kernels.registry import Kernel, Matmul, Problem, register
from qkernels.kernels.triton import int8, tables
from qkernels.kernels.triton.int8 import OPTIONS, Stored, Tile, blocks
from qkernels.kernels.triton.launch import SPLITS, Gpu, check, gathered, gpu_of, lanes_last, over_rows, reserve, why_not

TILES = (128, 64, 32)  # columns of a tile

# PTX for four bytes of two codes each; operands: the four lower and the four upper codes as int8, then the bytes (and four zeros)
SYMMETRIC = """{
.reg .b32 t;
shl.b32 t, $2, 4;
and.b32 $1, $2, 0xf0f0f0f0;
and.b32 $0, t, 0xf0f0f0f0;
}"""
# a bit in front keeps a subtraction from borrowing of the next byte; turning it afterwards takes 128 off
ZEROS = """{
.reg .b32 t, u;
shr.u32 u, $2, 4;
lop3.b32 t, $2, 0x0f0f0f0f, 0x80808080, 0xea;
lop3.b32 u, u, 0x0f0f0f0f, 0x80808080, 0xea;
sub.u32 t, t, $3;
sub.u32 u, u, $3;
xor.b32 $0, t, 0x80808080;
xor.b32 $1, u, 0x80808080;
}"""


class Packed(NamedTuple):
    """A weight as the kernel reads it.

    Shapes, with T columns a tile and G groups a row:
        weight        [ceil(K / T), N, T / 2]    uint8
        scales        [G, N]                     float32, float16 or bfloat16
        zeros         [G, N]                     uint8
        tensor_scale  None
        perm          [K]                        int32
    """

    format: QuantFormat
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None
    perm: Tensor | None


def tile_columns(format: QuantFormat, n: int, k: int) -> int:
    """Columns of a tile: as many as share a scale, at most 128; 0 where that is impossible."""
    group = format.group_extent(n, k)[1]
    return TILES[0] if group == k else next((t for t in TILES if group % t == 0), 0)


def prepare(q: QuantTensor) -> Packed:
    """Re-lay canonical codes in tiles; and make what a launch keeps on the device, before any CUDA graph is made."""
    assert q.scales is not None
    if q.codes.is_cuda:
        reserve(q.codes.device)
    (n, k), tile = q.shape, tile_columns(q.format, *q.shape)
    codes = unpack(q.codes, 4, k)
    nibbles = F.pad(codes if q.zeros is not None else codes ^ 8, (0, -k % tile))
    split = nibbles.view(n, -1, tile // 32, 2, 4, 4).permute(1, 0, 4, 2, 5, 3)  # tile, row, c, s, e, h
    weight = pack(split.flatten(2), 4)
    zeros = None if q.zeros is None else q.zeros.t().contiguous()
    return Packed(q.format, q.shape, weight, q.scales.t().contiguous(), zeros, None, q.perm)


def restore(packed: Packed) -> QuantTensor:
    """Invert `prepare`, bit for bit."""
    format, shape, _, scales, zeros, _, perm = packed
    canonical = None if zeros is None else zeros.t().contiguous()
    return QuantTensor(format, shape, pack(_codes(packed), 4), scales.t().contiguous(), canonical, None, perm)


def rows(packed: Packed, index: Tensor) -> QuantTensor:
    """Take rows [R] out, canonical, without the others."""
    zeros = None if packed.zeros is None else packed.zeros[:, index]
    return restore(
        packed._replace(shape=(len(index), packed.shape[1]), weight=packed.weight[:, index], scales=packed.scales[:, index], zeros=zeros)
    )


def _codes(packed: Packed) -> Tensor:
    """Codes [N, K] as the format has them."""
    (n, k), weight = packed.shape, packed.weight
    tile = 2 * weight.shape[2]
    split = unpack(weight, 4, tile).view(-1, n, 4, tile // 32, 4, 2).permute(1, 0, 3, 5, 2, 4)  # row, tile, s, h, c, e
    nibbles = split.reshape(n, -1)[:, :k]
    return nibbles.contiguous() if packed.zeros is not None else nibbles ^ 8


# -- tiles ----------------------------------------------------------------------------------------------------------------------------


def choose(n: int, k: int, m: int, tile_k: int, row: bool, gpu: Gpu) -> Tile:
    """The tile for x [m, k] and a weight [n, k]: as s8_gemm.py has it, where registers allow; right on a GPU, not tuned on one.

    row: one scale for a row. Else there are two sets of sums, of this product and of all: with 128 × 256 of them, more than the registers.
    """
    largest, large = Tile(128, 256, 8, raster=4), Tile(128, 128, 8, num_stages=3)
    if m <= 64:
        t = Tile(64, 16 if m <= 16 else 32 if m <= 32 else 64, 4, num_stages=6)
    elif row and blocks(largest, n, m) >= 16 * gpu.processors and largest.num_stages * stage_bytes(largest, tile_k) <= gpu.shared_bytes:
        t = largest
    else:
        t = large if 4 * blocks(large, n, m) >= 3 * gpu.processors else Tile(64, 64, 4)
    wanted = round(2 * gpu.processors / blocks(t, n, m)) if m <= 64 else gpu.processors // blocks(t, n, m)
    stages = min(t.num_stages, gpu.shared_bytes // stage_bytes(t, tile_k))
    split = max(s for s in SPLITS if s <= max(1, min(wanted, -(-k // tile_k) // 2)))
    return t._replace(num_stages=stages, split_k=split, early=gpu.early)


def choose_for(format: QuantFormat, n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """The tile that was found by tuning, or `choose_by_shape`."""
    return tables.tile_for(KERNEL.name, choose_by_shape(format, n, k, m, gpu), OPTIONS, gpu, format.name, n, k, m)


def choose_by_shape(format: QuantFormat, n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """`choose`, for a weight in `format`."""
    return choose(n, k, m, tile_columns(format, n, k), format.group_extent(n, k)[1] == k, gpu)


def stage_bytes(t: Tile, tile_k: int) -> int:
    """Shared memory of one stage of the pipeline, with some for barriers."""
    return (t.block_n // 2 + t.block_m) * tile_k + 128


# -- launching ------------------------------------------------------------------------------------------------------------------------


def _run(x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, bias: Tensor | None, format: str) -> Tensor:
    """x [..., K] -> [..., N]."""
    tiles, n, row_bytes = weight.shape
    check(x, weight, 2 * tiles * row_bytes)
    what, stored = formats.get(format), Stored(weight, scales, zeros)
    return over_rows(x, n, lambda rows, out: multiply(rows, stored, bias, what, out))


def multiply(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor, tile: Tile | None = None) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias; a tile of one's own is for tuning."""
    k, n = x.shape[1], out.shape[1]

    def plan(m: int) -> int8.Product:
        from qkernels.kernels.triton.jit.s8_w4_gemm import gemm

        t = tile or choose_for(format, n, k, m, gpu_of(x.device))
        values = constants(format, n, k, x.is_cuda)
        return int8.Product(gemm, tuple({**values, **tile_constants(t)}.values()), t, exact=values["ROW"])

    padded = 2 * stored.weight.shape[0] * stored.weight.shape[2]
    int8.multiply(plan, ("s8_w4", format, tile), x, stored, bias, out, padded)


def constants(format: QuantFormat, n: int, k: int, assembly: bool) -> dict[str, Any]:
    """The compile-time constants of `gemm` that a format and a shape decide, in its order; no assembly for the interpreter."""
    tile_k, group = tile_columns(format, n, k), format.group_extent(n, k)[1]
    asm = SYMMETRIC if format.zero == "none" else ZEROS
    return {
        "ASM": asm if assembly else None,
        "ROW": group == k,
        "TILE_K": tile_k,
        "GROUP_TILES": 1 << 30 if group == k else group // tile_k,
    }


def tile_constants(t: Tile) -> dict[str, Any]:
    """The others, in its order."""
    return {"BLOCK_N": t.block_n, "BLOCK_M": t.block_m, "SPLIT_K": t.split_k, "RASTER": t.raster, "LAST": lanes_last(), "EARLY": t.early}


# -- the op and the kernel ------------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define("triton_s8_w4_gemm(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? bias, str format) -> Tensor")


def _run_fake(x, weight, scales, zeros, bias, format):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], weight.shape[1]))


_LIBRARY.impl("triton_s8_w4_gemm", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::triton_s8_w4_gemm", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op, name = torch.ops.qkernels.triton_s8_w4_gemm.default, format.name
    return gathered(lambda x, weight, scales, zeros, _, bias: op(x, weight, scales, zeros, bias, name))


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def dequantize(packed: Packed) -> Tensor:
    """[N, K] float32 from the packed form."""
    format, (n, k), _, scales, zeros, _, perm = packed
    group = format.group_extent(n, k)[1]

    def spread(of_groups: Tensor) -> Tensor:
        return of_groups.t().float().repeat_interleave(group, 1)[:, :k]

    w = _codes(packed).float()
    w -= 8 if zeros is None else spread(zeros)
    w *= spread(scales)
    return w if perm is None else torch.empty_like(w).index_copy_(1, perm.long(), w)


def format_why_not(f: QuantFormat, n: int, k: int) -> str | None:
    if f.block is not None:
        return f"{f.name} keeps its blocks; 4-bit integers with groups along K are taken"
    if not isinstance(f.code, Int) or f.bits != 4:
        return f"code {f.code.name} is no integer of 4 bits"
    if f.zero in ("float", "min") or (f.zero == "none" and f.code.bias != 8):
        return f"code {f.code.name} with zero {f.zero!r}: symmetric codes (u4b8) and integer zero points are taken"
    rows, columns = f.group_extent(n, k)
    if rows != 1 or not tile_columns(f, n, k):
        return f"groups of {rows} x {columns}; those within a row, of multiples of 32 or of all {k} columns, are taken"
    if f.scale not in ("f32", "f16", "bf16") or f.tensor_scale:
        return f"scales of {f.scale}{' and one of the tensor' if f.tensor_scale else ''}; f32, f16 and bf16 alone are taken"
    most = (2**31 - 1) // (127 * (128 if f.zero == "none" else 15))
    if columns == k and k > most:
        return f"K = {k}: int32 holds the sums of at most {most} products"
    if not formats.is_known(f):
        return f"the name {f.name}, by which its op takes a format, finds another one or none: register the format"
    return None


def _cost(p: Problem) -> float:
    """Two launches, and reading and multiplying as float activations do: it runs where int8 is asked for alone."""
    return 6.0 + max(p.format.nbytes(p.n, p.k) / 3e6, 2 * p.rows * p.n * p.k / 6e8)


KERNEL = register(
    Kernel(
        name="triton_s8_w4_gemm",
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
    )
)
