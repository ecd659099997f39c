"""y = x · Ŵᵀ in int8: products of codes are summed exactly, over the packed layout of ../s8_gemm.py."""

import triton
import triton.language as tl

from qkernels.kernels.triton.jit.shared import all_parts, arrives_last, place


@triton.jit(do_not_specialize=["M"])
def gemm(
    p_x, p_rows, p_w, p_s, p_z, p_bias, p_out, p_part, p_count, M, N, padded,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr, RASTER: tl.constexpr, EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N], or its part over a run of K, from codes [M, padded] and [N, padded].

    SPLIT_K      runs of K; their int32 sums meet in p_part, and the last one to arrive adds them up
    EARLY        the kernel before this one may still be running: nothing of its is touched before it has ended
    RASTER       tiles of weights that are worked on side by side for all tokens, for the cache's sake
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tile_n, tile_m = place(pid, tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), RASTER)
    tiles_k = tl.cdiv(padded, BLOCK_K)
    per_split = tl.cdiv(tiles_k, SPLIT_K)
    begin, end = split * per_split, tl.minimum(split * per_split + per_split, tiles_k)

    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_k = begin * BLOCK_K + tl.arange(0, BLOCK_K)
    # rows beyond the last are read as the last: loads without a mask, sums that nobody stores
    p_weights = p_w + tl.minimum(o_n, N - 1).to(tl.int64)[:, None] * padded + o_k[None, :]
    p_tokens = p_x + o_m.to(tl.int64)[None, :] * padded + o_k[:, None]
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for _ in range(begin, end):
        w = tl.load(p_weights)
        x = tl.load(p_tokens, m_m[None, :], other=0)
        sums = tl.dot(w, x, sums, out_dtype=tl.int32)
        p_weights += BLOCK_K
        p_tokens += BLOCK_K

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    o_out = o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    m_out = m_n[:, None] & m_m[None, :]
    if SPLIT_K > 1:
        p_own = p_part + o_out
        if arrives_last(sums, p_own, p_count + pid, split, M, N, m_out, SPLIT_K):
            sums = all_parts(p_own, p_count + pid, M, N, m_out, SPLIT_K, SPLIT_K if BLOCK_N * BLOCK_M <= 2048 else 1)
            finish(sums, p_rows, p_s, p_z, p_bias, p_out + o_out, o_n, o_m, m_n, m_m, m_out, M)
    else:
        finish(sums, p_rows, p_s, p_z, p_bias, p_out + o_out, o_n, o_m, m_n, m_m, m_out, M)


@triton.jit
def finish(sums, p_rows, p_s, p_z, p_bias, p_out, o_n, o_m, m_n, m_m, m_out, M):
    """Zero point, scales, bias; round and store."""
    if p_z is not None:
        zero = tl.load(p_z + o_n, m_n, other=0).to(tl.int32) - 128
        sums -= zero[:, None] * tl.load(p_rows + M + o_m, m_m, other=0.0).to(tl.int32)[None, :]
    y = sums.to(tl.float32) * tl.load(p_s + o_n, m_n, other=0.0).to(tl.float32)[:, None]
    y *= tl.load(p_rows + o_m, m_m, other=0.0)[None, :]
    if p_bias is not None:
        y += tl.load(p_bias + o_n, m_n, other=0.0).to(tl.float32)[:, None]
    tl.store(p_out, y.to(p_out.dtype.element_ty), m_out)
