"""y = x · Ŵᵀ with codes of 4 bits and activations in int8, over the packed layout of ../s8_w4_gemm.py."""

import triton
import triton.language as tl

from qkernels.kernels.triton.jit.f16_gemm import finished, word_rows
from qkernels.kernels.triton.jit.shared import all_parts, arrives_last, place


@triton.jit
def unpack(raw, zero, ASM: tl.constexpr, BLOCK_N: tl.constexpr, TILE_K: tl.constexpr, LAST: tl.constexpr):
    """Bytes in the axes of `word_rows`, TILE_K / 2 a row -> int8 [BLOCK_N, TILE_K]: 16 times the values; code - zero where there are zeros.

    zero: in the same axes, one a row. ASM is the PTX for four bytes, see ../s8_w4_gemm.py; the interpreter does without. Nothing moves
    between threads.
    """
    if zero is None:
        if ASM is not None:
            low, high = tl.inline_asm_elementwise(ASM, "=r,=r,r", [raw], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
        else:
            low, high = (raw << 4).to(tl.int8, bitcast=True), (raw & 0xF0).to(tl.int8, bitcast=True)
    else:
        if ASM is not None:
            zeros = tl.broadcast_to(zero, raw.shape)
            low, high = tl.inline_asm_elementwise(ASM, "=r,=r,r,r", [raw, zeros], dtype=(tl.int8, tl.int8), is_pure=True, pack=4)
        else:
            low, high = ((raw & 15) - zero).to(tl.int8, bitcast=True), ((raw >> 4) - zero).to(tl.int8, bitcast=True)
    w = tl.permute(tl.join(low, high), [1, 0, 2, 3, 4] if LAST else [1, 2, 0, 3, 4])
    w = tl.reshape(w, [BLOCK_N, 4, TILE_K // 32, 4, 2])  # row, c, s, e, h
    return tl.reshape(tl.permute(w, [0, 2, 4, 1, 3]), [BLOCK_N, TILE_K])


@triton.jit(do_not_specialize=["M"])
def gemm(
    p_x, p_rows, p_w, p_s, p_z, p_bias, p_out, p_part, p_count, M, N, padded,
    ASM: tl.constexpr, ROW: tl.constexpr, TILE_K: tl.constexpr, GROUP_TILES: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr, RASTER: tl.constexpr, LAST: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N], or its part over a run of K, from codes [M, padded] and packed weights.

    The weight is the left operand, which the tensor core takes from registers; the tokens are its columns.

    ROW          one scale for a row: the sums are int32 over all of K; else those of a tile, which become float32 and are scaled
    GROUP_TILES  tiles of K that share a scale
    SPLIT_K      runs of K; their sums meet in p_part, and the last one to arrive adds them up, always in the same order
    EARLY        the kernel before this one may still be running: what it writes, the codes of x, is touched only after it has ended;
                 it waited itself for the kernels that may have made the weight
    RASTER       tiles of weights that are worked on side by side for all tokens, for the cache's sake
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tile_n, tile_m = place(pid, tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), RASTER)
    tiles_k = tl.cdiv(padded, TILE_K)
    per_split = tl.cdiv(tiles_k, SPLIT_K)
    begin, end = split * per_split, tl.minimum(split * per_split + per_split, tiles_k)

    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_row = tl.minimum(o_n, N - 1)  # rows beyond the last are read as the last: loads without a mask, sums that nobody stores
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_rows = tl.minimum(tile_n * BLOCK_N + word_rows(BLOCK_N, LAST), N - 1)
    BYTES: tl.constexpr = TILE_K // 2
    o_bytes = tl.max_contiguous(tl.arange(0, BYTES), BYTES // 4)[None, None, None, :]  # a lane gets a quarter of a row, no more
    p_weights = p_w + begin.to(tl.int64) * N * BYTES + o_rows * BYTES + o_bytes
    p_tokens = p_x + o_m.to(tl.int64)[None, :] * padded + begin * TILE_K + tl.arange(0, TILE_K)[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.int32 if ROW else tl.float32)
    # scales and zeros are loaded a tile ahead; a run of K may be empty, but must not read beyond the weight
    last = tl.minimum(tl.maximum(end, begin + 1), tiles_k) - 1
    first = tl.minimum(begin, last) // GROUP_TILES * N
    scale, zero = p_s, p_z
    if not ROW:
        scale = tl.load(p_s + first + o_row)
    if p_z is not None:
        zero = tl.load(p_z + first + o_rows)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for kt in range(begin, end):
        raw = tl.load(p_weights)
        x = tl.load(p_tokens, m_m[None, :], other=0)
        p_weights += N * BYTES
        p_tokens += TILE_K
        this_scale, this_zero, following = scale, zero, tl.minimum(kt + 1, last) // GROUP_TILES * N
        if not ROW:
            scale = tl.load(p_s + following + o_row)
            if p_z is not None:
                zero = tl.load(p_z + following + o_rows)
        w = unpack(raw, this_zero, ASM, BLOCK_N, TILE_K, LAST)
        if ROW:
            sums = finished(tl.dot(w, x, sums, out_dtype=tl.int32), ASM)
        else:
            part = tl.dot(w, x, out_dtype=tl.int32).to(tl.float32)
            sums = tl.fma(part, tl.broadcast_to(this_scale.to(tl.float32)[:, None], part.shape), sums)

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    o_out = o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    m_out = m_n[:, None] & m_m[None, :]
    if SPLIT_K > 1:
        p_own = p_part + o_out
        if arrives_last(sums, p_own, p_count + pid, split, M, N, m_out, SPLIT_K):
            sums = all_parts(p_own, p_count + pid, M, N, m_out, SPLIT_K, SPLIT_K if BLOCK_N * BLOCK_M <= 2048 else 1)
            finish(sums, p_rows, p_s, p_z, p_bias, p_out + o_out, o_n, o_m, m_n, m_m, m_out, ROW)
    else:
        finish(sums, p_rows, p_s, p_z, p_bias, p_out + o_out, o_n, o_m, m_n, m_m, m_out, ROW)


@triton.jit
def finish(sums, p_rows, p_s, p_z, p_bias, p_out, o_n, o_m, m_n, m_m, m_out, ROW: tl.constexpr):
    """What is left of the scales, bias; round and store."""
    y = sums.to(tl.float32)
    if p_z is None:
        y *= 0.0625  # weights were 16 times their value
    if ROW:
        y *= tl.load(p_s + o_n, m_n, other=0.0).to(tl.float32)[:, None]
    y *= tl.load(p_rows + o_m, m_m, other=0.0)[None, :]
    if p_bias is not None:
        y += tl.load(p_bias + o_n, m_n, other=0.0).to(tl.float32)[:, None]
    tl.store(p_out, y.to(p_out.dtype.element_ty), m_out)
