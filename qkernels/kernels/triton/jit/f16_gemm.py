"""y = x · Ŵᵀ with 16-bit activations, and Ŵ itself, over the packed layout of ../layout.py."""

import triton
import triton.language as tl

from qkernels.kernels.triton.jit.shared import all_parts, arrives_last, columns, place, to_float


@triton.jit
def fetch(p_words, p_narrow, m_rows, ahead, WORDS: tl.constexpr):
    """Words of the wide and of the narrow plane, `ahead` of the pointers; where there is one plane, the other is not used."""
    words = tl.load(p_words + ahead, m_rows, other=0, eviction_policy="evict_first")
    if WORDS > 16:
        return words, tl.load(p_narrow + ahead, m_rows, other=0, eviction_policy="evict_first")
    else:
        return words, words


@triton.jit
def narrow_words(p_tile, o_rows, N, WORDS: tl.constexpr):
    """Pointers to the words of these rows, [.., 1], in the narrow plane of a tile: [.., WORDS - 16].

    What is said of their alignment is less than the truth: a lane shall load the words that belong to its four wide ones, and no more.
    """
    if WORDS > 16:
        o_narrow = tl.multiple_of(tl.arange(0, WORDS - 16), (WORDS - 16) // 4)
        return p_tile + N * 16 + o_rows * (WORDS - 16) + o_narrow
    else:
        return p_tile


@triton.jit
def word_rows(BLOCK_N: tl.constexpr, LAST: tl.constexpr):
    """Rows 0…BLOCK_N - 1 of a tile, in the four axes in which its words are loaded: to be broadcast with words 0…15.

    Loaded so, words lie in registers as the tensor core wants them, without a detour through shared memory: a warp takes 8 rows of 64
    bytes. The axis of those 8 has to be the one that Triton gives to lanes first: the first or (LAST) the last but one.
    """
    lanes, warps, halves = tl.arange(0, 8), tl.arange(0, BLOCK_N // 16) * 16, tl.arange(0, 2) * 8
    if LAST:
        return halves[:, None, None, None] + warps[None, :, None, None] + lanes[None, None, :, None]
    else:
        return lanes[:, None, None, None] + warps[None, :, None, None] + halves[None, None, :, None]


@triton.jit
def as_rows(words, BLOCK_N: tl.constexpr, LAST: tl.constexpr):
    """Words in the axes of `word_rows` -> [BLOCK_N, words of a row]."""
    return tl.reshape(tl.permute(words, [1, 0, 2, 3] if LAST else [1, 2, 0, 3]), [BLOCK_N, words.shape[3]])


@triton.jit
def tile(
    words, narrow, raw_scale, raw_zero, outer, p_table, BLOCK_N: tl.constexpr, BITS: tl.constexpr, TILE_K: tl.constexpr, ASM: tl.constexpr,
    CODE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, SCALED: tl.constexpr, REST: tl.constexpr, BASE: tl.constexpr,
    PER_TILE: tl.constexpr, OUTER_TILES: tl.constexpr, DTYPE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """Words of a tile -> [BLOCK_N, TILE_K] of DTYPE: value - zero, and times the scale where SCALED; plus the minimum.

    raw_…: [BLOCK_N, PER_TILE] as stored. Numbers of more than 16 bits come in two parts, so that a weight is rounded as if they had not.
    """
    w = columns(as_rows(words, BLOCK_N, LAST), as_rows(narrow, BLOCK_N, LAST), ASM, CODE, p_table, BITS, TILE_K, DTYPE)
    if ZERO == "none" and BASE != 0:
        w += BASE
    if ZERO == "none" and not SCALED:
        return w
    w = tl.reshape(w, [BLOCK_N, PER_TILE, TILE_K // PER_TILE])
    if ZERO == "int" or ZERO == "float":
        wide = raw_zero.to(tl.float32) - BASE
        zero = wide.to(DTYPE)
        w -= zero[:, :, None]
        if ZERO == "float":
            w -= (wide - zero.to(tl.float32)).to(DTYPE)[:, :, None]
    if SCALED:
        wide = numbers(raw_scale, outer, SCALE, OUTER_TILES, 0)
        scale = wide.to(DTYPE)
        if ZERO == "min":
            w = with_minima(w, wide, numbers(raw_zero, outer, SCALE, OUTER_TILES, 16) + BASE * wide, 2 ** (BITS - 1), DTYPE)
        elif REST:
            rest = (wide - scale.to(tl.float32)).to(DTYPE)
            w = tl.fma(w, tl.broadcast_to(scale[:, :, None], w.shape), w * rest[:, :, None])
        else:
            w *= scale[:, :, None]
    return tl.reshape(w, [BLOCK_N, TILE_K])


@triton.jit
def numbers(raw, outer, SCALE: tl.constexpr, OUTER_TILES: tl.constexpr, AT: tl.constexpr):
    """Scales or minima [ROWS, PER_TILE] as float32, of nested blocks times the float16 that is at bit AT of `outer` [ROWS]."""
    wide = to_float((raw >> (AT // 4)) & 15 if SCALE == "u4" else raw, SCALE)
    if OUTER_TILES > 0:
        half = (outer >> AT).to(tl.int16).to(tl.float16, bitcast=True) if outer.dtype == tl.int32 else outer
        wide *= half.to(tl.float32)[:, None]
    return wide


@triton.jit
def with_minima(w, scale, minimum, MOST: tl.constexpr, DTYPE: tl.constexpr):
    """w · scale + minimum, rounded to DTYPE but once: w [ROWS, PER_TILE, columns] are integers up to MOST, the others float32 of groups.

    Both come in two parts, of which the coarser are multiples of a unit so large that DTYPE holds w times the one plus the other.
    """
    if DTYPE == tl.float32:  # noqa: SIM300
        return w * scale[:, :, None] + minimum[:, :, None]
    PRECISION: tl.constexpr = 8 if DTYPE == tl.bfloat16 else 11  # noqa: SIM300
    largest = tl.abs(minimum) + MOST * tl.abs(scale)
    power = (largest.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)  # of two, not above it
    rounder = power * (1.5 * 2 ** (25 - PRECISION))  # float32 sums with it are multiples of the unit, 4 · power / 2^PRECISION
    coarse_scale, coarse_minimum = scale + rounder - rounder, minimum + rounder - rounder
    fine = tl.fma(w, of_columns(scale - coarse_scale, w, DTYPE), of_columns(minimum - coarse_minimum, w, DTYPE))
    return tl.fma(w, of_columns(coarse_scale, w, DTYPE), of_columns(coarse_minimum, w, DTYPE)) + fine


@triton.jit
def of_columns(per_group, w, DTYPE: tl.constexpr):
    """[ROWS, PER_TILE] -> as w [ROWS, PER_TILE, columns], of DTYPE."""
    return tl.broadcast_to(per_group.to(DTYPE)[:, :, None], w.shape)


@triton.jit
def finished(sums, ASM: tl.constexpr):
    """The same sums, after the tensor core is done with them.

    Triton otherwise lets products of one iteration run into the next, which overwrites the registers that they take weights from:
    seen on an H100 with Triton 3.6, codes of 8 bits, 300 tokens. An instruction on the sums, which comes to nothing, makes it wait.
    """
    if ASM is not None:
        return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [sums], dtype=sums.dtype, is_pure=True, pack=1)
    else:
        return sums


@triton.jit
def stored(
    p_s, p_z, p_outer, kt, o_n, m_n, N, ZERO: tl.constexpr, SCALED: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_TILES: tl.constexpr,
    PER_TILE: tl.constexpr, OUTER_TILES: tl.constexpr,
):  # fmt: skip
    """Scales, and zeros or minima, of tile kt, [BLOCK_N, PER_TILE] as they are stored; and what multiplies them, [BLOCK_N].

    What is not wanted is one of the others, which then is not used.
    """
    rows_s = tl.cdiv(N, GROUP_ROWS)  # of the scales
    o_group = (kt // GROUP_TILES * rows_s + o_n // GROUP_ROWS)[:, None] * PER_TILE + tl.arange(0, PER_TILE)[None, :]
    if SCALED:
        scale = tl.load(p_s + o_group, m_n[:, None], other=0)
        zero, outer = scale, scale
        if p_z is not None:
            zero = tl.load(p_z + o_group, m_n[:, None], other=0)
        if OUTER_TILES > 0:
            outer = tl.load(p_outer + kt // OUTER_TILES * N + o_n, m_n, other=0)
        return scale, zero, outer
    else:
        zero = tl.load(p_z + o_group, m_n[:, None], other=0)
        return zero, zero, zero


@triton.jit
def add_tile(
    sums, words, narrow, x, scale, zero, outer, p_s, p_table, kt, o_n, m_n, rows_s, BLOCK_N: tl.constexpr, BITS: tl.constexpr,
    TILE_K: tl.constexpr, ASM: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr, ZERO: tl.constexpr, BASE: tl.constexpr,
    REST: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_TILES: tl.constexpr, PER_TILE: tl.constexpr, OUTER_TILES: tl.constexpr,
    MODE: tl.constexpr, DTYPE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """sums + (words of tile kt, as weights) · x."""
    w = tile(
        words, narrow, scale, zero, outer, p_table, BLOCK_N, BITS, TILE_K, ASM, CODE, SCALE, ZERO, MODE == "word", REST, BASE, PER_TILE,
        OUTER_TILES, DTYPE, LAST,
    )  # fmt: skip
    if MODE == "sum":  # loaded only now: earlier, with the words, it kept them waiting (NOTES.md)
        wide = to_float(tl.load(p_s + kt // GROUP_TILES * rows_s + o_n // GROUP_ROWS, m_n, other=0), SCALE)
        return sums + tl.dot(w, x, input_precision="ieee") * wide[:, None]
    else:
        return finished(tl.dot(w, x, sums, input_precision="ieee"), ASM)


@triton.jit(do_not_specialize=["M"])
def gemm(
    p_x, p_w, p_s, p_z, p_tensor_scale, p_table, p_bias, p_out, p_part, p_count, M, N, K, stride_x,
    BITS: tl.constexpr, TILE_K: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr,
    ZERO: tl.constexpr, BASE: tl.constexpr, REST: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_TILES: tl.constexpr,
    PER_TILE: tl.constexpr, OUTER_TILES: tl.constexpr, MODE: tl.constexpr, DTYPE: tl.constexpr, EVEN_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, SPLIT_K: tl.constexpr, RASTER: tl.constexpr, STEP: tl.constexpr, LAST: tl.constexpr,
    EARLY: tl.constexpr,
):  # fmt: skip
    """One tile of y [M, N], or its part over a run of K.

    The weight is the left operand, so that the tensor core takes it from registers; the tokens are its columns.

    TILE_K       columns of a tile of the weight; WORDS: of a row there, those beyond 16 in the narrow plane
    MODE         where scales are applied: "row" once to the sums, "sum" to every tile's sums, "word" to the weights
    GROUP_ROWS   rows that share scales; GROUP_TILES: tiles that do; PER_TILE: scales of one tile
    OUTER_TILES  tiles of a nested block, whose scales, and minima, p_tensor_scale multiplies; 0: there is no such number
    SPLIT_K      runs of K; their float32 sums meet in p_part, and the last one to arrive adds them up, always in the same order
    EARLY        the kernel before this one may still be running: what it wrote is touched only after it has ended; weights are older,
                 and the first of them are fetched meanwhile
    STEP         tiles of K worked on at a time: so many more bytes are on their way meanwhile
    RASTER       tiles of weights that are worked on side by side for all tokens, for the cache's sake
    """
    pid, split = tl.program_id(0), tl.program_id(1)
    tile_n, tile_m = place(pid, tl.cdiv(N, BLOCK_N), tl.cdiv(M, BLOCK_M), RASTER)
    tiles_k = tl.cdiv(K, TILE_K)
    per_split = tl.cdiv(tiles_k, SPLIT_K)
    begin, end = split * per_split, tl.minimum(split * per_split + per_split, tiles_k)

    o_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    o_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    o_k = tl.arange(0, TILE_K)
    o_rows, o_word = tile_n * BLOCK_N + word_rows(BLOCK_N, LAST), tl.arange(0, 16)[None, None, None, :]
    m_rows = o_rows < N
    p_tile = p_w + tl.minimum(begin, tiles_k - 1).to(tl.int64) * N * WORDS
    p_words, p_narrow = p_tile + o_rows * 16 + o_word, narrow_words(p_tile, o_rows, N, WORDS)
    p_tokens = p_x + o_m.to(tl.int64)[None, :] * stride_x + begin * TILE_K + o_k[:, None]
    rows_s = tl.cdiv(N, GROUP_ROWS)  # of the scales
    sums = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    # what the next step needs is loaded while this one is worked on; a run of K may be empty, but must not read beyond the weight
    last = tl.maximum(end, begin + 1) - 1
    words, narrow = fetch(p_words, p_narrow, m_rows, 0, WORDS)
    if STEP == 2:
        second, second_narrow = fetch(p_words, p_narrow, m_rows, tl.where(begin < last, N * WORDS, 0), WORDS)
    NUMBERS: tl.constexpr = MODE == "word" or ZERO != "none"
    scale, zero, outer = None, None, None
    if NUMBERS and STEP == 1:
        scale, zero, outer = stored(
            p_s, p_z, p_tensor_scale, tl.minimum(begin, tiles_k - 1), o_n, m_n, N, ZERO, MODE == "word", GROUP_ROWS, GROUP_TILES,
            PER_TILE, OUTER_TILES,
        )  # fmt: skip
    if EARLY:
        tl.extra.cuda.gdc_wait()
    for kt in range(begin, end, STEP):
        m_x = m_m[None, :] if EVEN_K else m_m[None, :] & (kt * TILE_K + o_k < K)[:, None]
        x = tl.load(p_tokens, m_x, other=0.0).to(DTYPE)
        if STEP == 2:
            m_second = (o_m < tl.where(kt < last, M, 0))[None, :]
            if not EVEN_K:
                m_second = m_second & (kt * TILE_K + TILE_K + o_k < K)[:, None]
            second_x = tl.load(p_tokens + TILE_K, m_second, other=0.0).to(DTYPE)
        p_tokens += STEP * TILE_K
        now, now_narrow = words, narrow
        p_words += tl.minimum(STEP, last - kt) * (N * WORDS)
        if WORDS > 16:
            p_narrow += tl.minimum(STEP, last - kt) * (N * WORDS)
        words, narrow = fetch(p_words, p_narrow, m_rows, 0, WORDS)
        if STEP == 2:
            after, after_narrow = second, second_narrow
            second, second_narrow = fetch(p_words, p_narrow, m_rows, tl.where(kt + 2 < last, N * WORDS, 0), WORDS)
        if NUMBERS and STEP == 1:
            this_scale, this_zero, this_outer = scale, zero, outer
            scale, zero, outer = stored(
                p_s, p_z, p_tensor_scale, tl.minimum(kt + 1, last), o_n, m_n, N, ZERO, MODE == "word", GROUP_ROWS, GROUP_TILES, PER_TILE,
                OUTER_TILES,
            )  # fmt: skip
        elif NUMBERS:
            this_scale, this_zero, this_outer = stored(
                p_s, p_z, p_tensor_scale, kt, o_n, m_n, N, ZERO, MODE == "word", GROUP_ROWS, GROUP_TILES, PER_TILE, OUTER_TILES
            )  # fmt: skip
            second_scale, second_zero, second_outer = stored(
                p_s, p_z, p_tensor_scale, tl.minimum(kt + 1, last), o_n, m_n, N, ZERO, MODE == "word", GROUP_ROWS, GROUP_TILES, PER_TILE,
                OUTER_TILES,
            )  # fmt: skip
        else:
            this_scale, this_zero, this_outer, second_scale, second_zero, second_outer = None, None, None, None, None, None
        sums = add_tile(
            sums, now, now_narrow, x, this_scale, this_zero, this_outer, p_s, p_table, kt, o_n, m_n, rows_s, BLOCK_N, BITS, TILE_K, ASM,
            CODE, SCALE, ZERO, BASE, REST, GROUP_ROWS, GROUP_TILES, PER_TILE, OUTER_TILES, MODE, DTYPE, LAST,
        )  # fmt: skip
        if STEP == 2:
            sums = add_tile(
                sums, after, after_narrow, second_x, second_scale, second_zero, second_outer, p_s, p_table, tl.minimum(kt + 1, last), o_n,
                m_n, rows_s, BLOCK_N, BITS, TILE_K, ASM, CODE, SCALE, ZERO, BASE, REST, GROUP_ROWS, GROUP_TILES, PER_TILE, OUTER_TILES,
                MODE, DTYPE, LAST,
            )  # fmt: skip

    if EARLY:
        tl.extra.cuda.gdc_launch_dependents()
    p_tensor = p_tensor_scale if OUTER_TILES == 0 else None
    o_out = o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    m_out = m_n[:, None] & m_m[None, :]
    if SPLIT_K > 1:
        p_own = p_part + o_out
        if arrives_last(sums, p_own, p_count + pid, split, M, N, m_out, SPLIT_K):
            UNROLL: tl.constexpr = SPLIT_K if BLOCK_N * BLOCK_M * SPLIT_K <= 32768 else 1
            sums = all_parts(p_own, p_count + pid, M, N, m_out, SPLIT_K, UNROLL)
            finish(sums, p_s, p_tensor, p_bias, p_out + o_out, o_n, m_n, m_out, SCALE, MODE, GROUP_ROWS)
    else:
        finish(sums, p_s, p_tensor, p_bias, p_out + o_out, o_n, m_n, m_out, SCALE, MODE, GROUP_ROWS)


@triton.jit
def finish(
    sums, p_s, p_tensor_scale, p_bias, p_out, o_n, m_n, m_out, SCALE: tl.constexpr, MODE: tl.constexpr, GROUP_ROWS: tl.constexpr
):  # fmt: skip
    """Scale of the row and of the tensor, bias; round and store."""
    if MODE == "row":
        sums *= to_float(tl.load(p_s + o_n // GROUP_ROWS, m_n, other=0), SCALE)[:, None]
    if p_tensor_scale is not None:
        sums *= tl.load(p_tensor_scale)
    if p_bias is not None:
        sums += tl.load(p_bias + o_n, m_n, other=0.0).to(tl.float32)[:, None]
    tl.store(p_out, sums.to(p_out.dtype.element_ty), m_out)


@triton.jit
def dequantize(
    p_w, p_s, p_z, p_tensor_scale, p_table, p_out, first_row, first_tile, rows, N, K, stride_out,
    BITS: tl.constexpr, TILE_K: tl.constexpr, WORDS: tl.constexpr, ASM: tl.constexpr, CODE: tl.constexpr, SCALE: tl.constexpr,
    ZERO: tl.constexpr, BASE: tl.constexpr, GROUP_ROWS: tl.constexpr, GROUP_TILES: tl.constexpr, PER_TILE: tl.constexpr,
    OUTER_TILES: tl.constexpr, DTYPE: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Ŵ from first_row and first_tile on, in the type of p_out [rows, stride_out]: exact products in float32, rounded once."""
    kt = first_tile + tl.program_id(1)
    o_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < rows
    o_rows, o_word = first_row + o_n[:, None], tl.arange(0, 16)[None, :]
    p_tile = p_w + kt.to(tl.int64) * N * WORDS
    words, narrow = fetch(p_tile + o_rows * 16 + o_word, narrow_words(p_tile, o_rows, N, WORDS), m_n[:, None], 0, WORDS)
    w = columns(words, narrow, ASM, CODE, p_table, BITS, TILE_K, DTYPE).to(tl.float32)
    # numbers of column groups: [BLOCK_N, PER_TILE] spread over the columns
    scale, zero, outer = stored(
        p_s, p_z, p_tensor_scale, kt, first_row + o_n, m_n, N, ZERO, True, GROUP_ROWS, GROUP_TILES, PER_TILE, OUTER_TILES
    )  # fmt: skip
    w = tl.reshape(w, [BLOCK_N, PER_TILE, TILE_K // PER_TILE])
    if ZERO == "int" or ZERO == "float":
        w -= (zero.to(tl.float32) - BASE)[:, :, None]
    else:
        w += BASE
    w *= numbers(scale, outer, SCALE, OUTER_TILES, 0)[:, :, None]
    if ZERO == "min":
        w += numbers(zero, outer, SCALE, OUTER_TILES, 16)[:, :, None]
    if p_tensor_scale is not None and OUTER_TILES == 0:
        w *= tl.load(p_tensor_scale)
    o_k = kt * TILE_K + tl.arange(0, TILE_K)
    w = tl.reshape(w, [BLOCK_N, TILE_K])
    p_out += o_n.to(tl.int64)[:, None] * stride_out + (o_k - first_tile * TILE_K)[None, :]
    tl.store(p_out, w.to(p_out.dtype.element_ty), m_n[:, None] & (o_k < K)[None, :])
