"""y = x · Ŵᵀ in int8: rows of x become codes, then products of codes are summed exactly, over the packed layout of ../s8_gemm.py."""

import triton
import triton.language as tl

from qkernels.kernels.triton.jit.shared import place


@triton.jit(do_not_specialize=["M"])
def quantize_rows(p_x, p_codes, p_rows, M, K, padded, stride_x, BLOCK: tl.constexpr, EARLY: tl.constexpr):
    """A row of x [M, K] -> int8 codes [M, padded], its scale and the sum of its codes, float32 [2, M]; one program a row.

    Codes are to the nearest, ties to even. The sum is exact below 2^24. A row that is not finite gets the scale NaN; one of at most 2^-118
    counts as zeros: its scale would have lost bits.
    """
    row = tl.program_id(0)
    p_x += row.to(tl.int64) * stride_x
    p_codes += row.to(tl.int64) * padded
    o_k = tl.arange(0, BLOCK)
    if EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()
    largest = tl.zeros([BLOCK], tl.float32)
    for first in range(0, K, BLOCK):
        a = tl.abs(tl.load(p_x + first + o_k, first + o_k < K, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(a < float("inf"), a, float("inf")))  # a maximum may pass over NaN
    amax = tl.max(largest, 0)
    usable = (amax > 3.0e-36) & (amax < float("inf"))
    inverse = tl.where(usable, 127.0 / tl.where(usable, amax, 1.0), 0.0)
    scale = tl.where(usable, amax / 127.0, tl.where(amax < float("inf"), 0.0, float("nan")))
    total = tl.zeros([BLOCK], tl.int32)
    for first in range(0, padded, BLOCK):
        x = tl.load(p_x + first + o_k, first + o_k < K, other=0.0).to(tl.float32)
        # next to 1.5 · 2^23 floats are whole numbers: their last bits are the code
        code = (x * inverse + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000
        tl.store(p_codes + first + o_k, code.to(tl.int8), first + o_k < padded)
        total += code
    tl.store(p_rows + row, scale)
    tl.store(p_rows + M + row, tl.sum(total, 0).to(tl.float32))


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
        tl.store(p_own + split.to(tl.int64) * M * N, sums, m_out)
        tl.debug_barrier()  # all threads' sums are written before one thread says so
        if tl.atomic_add(p_count + pid, 1, sem="acq_rel") == SPLIT_K - 1:
            sums = tl.zeros([BLOCK_N, BLOCK_M], tl.int32)
            # all parts of a small tile at once; of a large one, registers hold no more than one
            for i in tl.range(0, SPLIT_K, num_stages=1, loop_unroll_factor=SPLIT_K if BLOCK_N * BLOCK_M <= 2048 else 1):
                sums += tl.load(p_own + tl.cast(M, tl.int64) * N * i, m_out, other=0, cache_modifier=".cg")
            tl.store(p_count + pid, 0)  # as the next call wants it
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
