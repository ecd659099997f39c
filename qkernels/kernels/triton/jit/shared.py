"""Device functions that the kernels share: from packed words to the columns of a tile, and from stored scales to floats."""

import triton
import triton.language as tl

# `p_` pointer, `o_` offsets, `m_` mask; the layout of words is described in ../layout.py


@triton.jit
def columns(words, narrow, ASM: tl.constexpr, CODE: tl.constexpr, p_table, BITS: tl.constexpr, TILE_K: tl.constexpr, DTYPE: tl.constexpr):
    """Unpack words [ROWS, 16] into the columns of their tile, [ROWS, TILE_K] of DTYPE. Moves nothing between threads.

    narrow: the words of the narrow plane [ROWS, 16 / R], where codes have one.
    CODE is "int", of which code - 2^(BITS - 1) comes out, "table", "e4m3" or "e5m2".
    ASM is the PTX for one word, see ../unpack_asm.py; without it (the interpreter, other GPUs) shifts do, or the table [16] float32.
    """
    WIDE: tl.constexpr = 512 // TILE_K
    v, beside = None, None
    if BITS > WIDE:
        beside = turned(narrow, BITS, WIDE)
    if ASM is not None:
        v = by_asm(words, beside, ASM, 32 // WIDE, DTYPE)
    # row, word, e, h, s bit by bit -> row, s', s, h, c, e
    if TILE_K == 64:
        t = four(v, words, beside, 0, CODE, p_table, BITS, WIDE, DTYPE)
        t = tl.permute(tl.reshape(t, [words.shape[0], 4, 4, 2, 2]), [0, 2, 4, 1, 3])
    elif TILE_K == 128:
        t = eight(v, words, beside, 0, CODE, p_table, BITS, WIDE, DTYPE)
        t = tl.permute(tl.reshape(t, [words.shape[0], 4, 4, 2, 2, 2]), [0, 2, 5, 4, 1, 3])
    else:
        t = eight(v, words, beside, 0, CODE, p_table, BITS, WIDE, DTYPE)
        t = tl.join(t, eight(v, words, beside, 8, CODE, p_table, BITS, WIDE, DTYPE))
        t = tl.permute(tl.reshape(t, [words.shape[0], 4, 4, 2, 2, 2, 2]), [0, 2, 6, 5, 4, 1, 3])
    return tl.reshape(t, [words.shape[0], TILE_K])


@triton.jit
def turned(narrow, BITS: tl.constexpr, WIDE: tl.constexpr):
    """Words of the narrow plane [ROWS, 16 / R] -> [ROWS, 16]: for each word of the wide plane its own, turned as it needs it."""
    TURN: tl.constexpr = 2 * (BITS - WIDE)
    if WIDE // (BITS - WIDE) == 4:
        twice = tl.join(narrow, rotated(narrow, 2 * TURN))
        t = tl.join(twice, rotated(twice, TURN))
    else:
        t = tl.join(narrow, rotated(narrow, TURN))
    return tl.reshape(t, [narrow.shape[0], 16])


@triton.jit
def rotated(words, LEFT: tl.constexpr):
    return (words << LEFT) | ((words >> (32 - LEFT)) & (2**LEFT - 1))


@triton.jit
def by_asm(words, beside, ASM: tl.constexpr, VALUES: tl.constexpr, DTYPE: tl.constexpr):
    """Run the PTX. A tuple of types cannot be made from DTYPE."""
    FORM: tl.constexpr = "=h," * VALUES + ("r" if beside is None else "r,r")
    operands = [words] if beside is None else [words, beside]
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(ASM, FORM, operands, dtype=(tl.bfloat16,) * VALUES, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(ASM, FORM, operands, dtype=(tl.float16,) * VALUES, is_pure=True, pack=1)


@triton.jit
def eight(v, words, beside, J: tl.constexpr, CODE: tl.constexpr, p_table, BITS: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Values J…J + 7 of every word, along new axes of 2, of which the last counts slowest; v has them if the PTX ran."""
    left = four(v, words, beside, J, CODE, p_table, BITS, WIDE, DTYPE)
    return tl.join(left, four(v, words, beside, J + 4, CODE, p_table, BITS, WIDE, DTYPE))


@triton.jit
def four(v, words, beside, J: tl.constexpr, CODE: tl.constexpr, p_table, BITS: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr):
    if v is not None:
        return tl.join(tl.join(v[J], v[J + 1]), tl.join(v[J + 2], v[J + 3]))
    else:
        left = tl.join(
            value(words, beside, J, CODE, p_table, BITS, WIDE, DTYPE), value(words, beside, J + 1, CODE, p_table, BITS, WIDE, DTYPE)
        )  # fmt: skip
        right = tl.join(
            value(words, beside, J + 2, CODE, p_table, BITS, WIDE, DTYPE), value(words, beside, J + 3, CODE, p_table, BITS, WIDE, DTYPE)
        )  # fmt: skip
        return tl.join(left, right)


@triton.jit
def value(words, beside, J: tl.constexpr, CODE: tl.constexpr, p_table, BITS: tl.constexpr, WIDE: tl.constexpr, DTYPE: tl.constexpr):
    """Value J of every word."""
    if CODE == "table":
        return tl.load(p_table + ((words >> (BITS * J)) & (2**BITS - 1))).to(DTYPE)
    ODD: tl.constexpr = J // 2 % 2
    if beside is not None:
        LOWER: tl.constexpr = 0x33333333 if WIDE == 2 else 0x0F0F0F0F  # of every 2 WIDE bits
        words = (beside & LOWER) | (words & ~LOWER) if ODD else (words & LOWER) | (beside & ~LOWER)
    code = (words >> (WIDE * (J // 2) + 16 * (J % 2) - (BITS - WIDE) * ODD)) & (2**BITS - 1)
    if CODE != "int":
        return to_float(code, CODE).to(DTYPE)
    else:
        return (code - 2 ** (BITS - 1)).to(tl.float32).to(DTYPE)


@triton.jit
def to_float(s, SCALE: tl.constexpr):
    """A stored number as float32; SCALE names its type where Triton has none for it on every GPU."""
    if SCALE == "e8m0":  # 2^(s - 127); 2^-127 is subnormal, 255 is NaN
        bits = tl.where(s == 0, 0x00400000, s.to(tl.int32) << 23)
        return tl.where(s == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        wide = s.to(tl.int32)
        magnitude = ((wide & 0x7F) << 20).to(tl.float32, bitcast=True) * 1.329227995784916e36  # 2^120: the difference of the biases
        signed = tl.where((wide & 0x80) != 0, -magnitude, magnitude)
        return tl.where((wide & 0x7F) == 0x7F, float("nan"), signed)
    elif SCALE == "e5m2":
        return (s.to(tl.int32) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
    else:
        return s.to(tl.float32)


@triton.jit
def place(pid, tiles_n, tiles_m, RASTER: tl.constexpr):
    """(tile of weights, tile of tokens) of a program: RASTER tiles of weights side by side, for all tokens, for the cache's sake."""
    first = pid // (RASTER * tiles_m) * RASTER
    beside = tl.minimum(tiles_n - first, RASTER)
    return first + pid % (RASTER * tiles_m) % beside, pid % (RASTER * tiles_m) // beside


@triton.jit
def arrives_last(sums, p_own, p_count, split, M, N, m_out, SPLIT_K: tl.constexpr):
    """Store the sums of one part of K; whether it is the last of a tile's to do so."""
    tl.store(p_own + split.to(tl.int64) * M * N, sums, m_out)
    tl.debug_barrier()  # all threads' sums are written before one thread says so
    return tl.atomic_add(p_count, 1, sem="acq_rel") == SPLIT_K - 1


@triton.jit
def all_parts(p_own, p_count, M, N, m_out, SPLIT_K: tl.constexpr, UNROLL: tl.constexpr):
    """The sums of all parts, added in their order. UNROLL: as many at once; of a large tile, registers hold no more than one."""
    sums = tl.zeros(m_out.shape, p_own.dtype.element_ty)
    for i in tl.range(0, SPLIT_K, num_stages=1, loop_unroll_factor=UNROLL):
        sums += tl.load(p_own + tl.cast(M, tl.int64) * N * i, m_out, other=0, cache_modifier=".cg")
    tl.store(p_count, 0)  # as the next call wants it
    return sums
