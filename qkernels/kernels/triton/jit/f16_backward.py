"""grad_x = grad_y · Ŵ with 16-bit gradients, over the packed layout of ../layout.py."""

import triton
import triton.language as tl

from qkernels.kernels.triton.jit.f16_gemm import fetch, finished, narrow_words, stored, tile, word_rows
from qkernels.kernels.triton.jit.shared import all_parts, arrives_last, place


@triton.jit(do_not_specialize=["M"])
def gemm(
    p_y, p_w, p_s, p_z, p_tensor_scale, p_table, p_out, p_part, p_count, M, N, K, stride_y,
    BITS: tl.constexpr, TILE_K: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr,
    ZERO: tl.constexpr, BASE: tl.constexpr, REST: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_TILES: tl.constexpr,
    PER_TILE: tl.constexpr, OUTER_TILES: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT_N: tl.constexpr, RASTER: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """One tile [BLOCK_M, columns of a tile of the weight] of grad_x [M, K], or its part over a run of N.

    Scales are applied to the weights: they change along N, the axis of the sums. The constants are those of the forward's `gemm`.
    SPLIT_N      runs of N; their float32 sums meet in p_part, and the last one to arrive adds them up, always in the same order
    RASTER       tiles of columns that are worked on side by side for all tokens, for the cache's sake
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    kt, tile_m = place(pid, tl.cdiv(K, TILE_K), tl.cdiv(M, BLOCK_M), RASTER)
    blocks_n = tl.cdiv(N, BLOCK_N)
    per_split = tl.cdiv(blocks_n, SPLIT_N)
    begin, end = split * per_split, tl.minimum(split * per_split + per_split, blocks_n)

    o_m, o_k = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), kt * TILE_K + tl.arange(0, TILE_K)
    m_m = o_m < M
    o_rows, o_word = word_rows(BLOCK_N, LAST), tl.arange(0, 16)[None, None, None, :]
    p_tile = p_w + kt.to(tl.int64) * N * WORDS
    p_words, p_narrow = p_tile + o_rows * 16 + o_word, narrow_words(p_tile, o_rows, N, WORDS)
    p_grads = p_y + o_m.to(tl.int64)[:, None] * stride_y + tl.arange(0, BLOCK_N)[None, :]
    sums = tl.zeros([BLOCK_M, TILE_K], tl.float32)
    for nt in range(begin, end):
        first = nt * BLOCK_N
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < N
        y = tl.load(p_grads + first, m_m[:, None] & m_n[None, :], other=0.0).to(DTYPE)
        words, narrow = fetch(p_words + first * 16, p_narrow + first * (WORDS - 16), first + o_rows < N, 0, WORDS)
        scale, zero, outer = stored(
            p_s, p_z, p_tensor_scale, kt, o_n, m_n, N, ZERO, True, GROUP_ROWS, GROUP_TILES, PER_TILE, OUTER_TILES
        )  # fmt: skip
        w = tile(
            words, narrow, scale, zero, outer, p_table, BLOCK_N, BITS, TILE_K, ASM, CODE, SCALE, ZERO, True, REST, BASE, PER_TILE,
            OUTER_TILES, DTYPE, LAST,
        )  # fmt: skip
        sums = finished(tl.dot(y, w, sums, input_precision="ieee"), ASM)

    p_tensor = p_tensor_scale if OUTER_TILES == 0 else None
    p_tile = o_m.to(tl.int64)[:, None] * K + o_k[None, :]
    m_tile = m_m[:, None] & (o_k < K)[None, :]
    if SPLIT_N > 1:
        p_own = p_part + p_tile
        if arrives_last(sums, p_own, p_count + pid, split, M, K, m_tile, SPLIT_N):
            sums = all_parts(p_own, p_count + pid, M, K, m_tile, SPLIT_N, 1)
            finish(sums, p_tensor, p_out + p_tile, m_tile)
    else:
        finish(sums, p_tensor, p_out + p_tile, m_tile)


@triton.jit
def finish(sums, p_tensor_scale, p_out, m_out):
    """Scale of the tensor; round and store."""
    if p_tensor_scale is not None:
        sums *= tl.load(p_tensor_scale)
    tl.store(p_out, sums.to(p_out.dtype.element_ty), m_out)
