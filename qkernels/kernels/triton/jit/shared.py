"""Device functions that the kernels share: from packed words to the columns of a tile, and from stored scales to floats."""

import triton
import triton.language as tl

# `p_` pointer, `o_` offsets, `m_` mask; the layout of words is described in ../layout.py


@triton.jit
def unpack(words, ASM: tl.constexpr, CODE: tl.constexpr, p_table, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Unpack words [..] into 32 / BITS tensors [..] of DTYPE, in order of the columns.

    CODE is "int", of which code - 2^(BITS - 1) comes out, "table", "e4m3" or "e5m2".
    ASM is the PTX for one word, see ../unpack_asm.py; without it (the interpreter, other GPUs) shifts do, or the table [16] float32.
    """
    if ASM is not None:
        return by_asm(words, ASM, BITS, DTYPE)
    elif BITS == 8:
        return (
            value(words, 0, BITS, CODE, p_table, DTYPE), value(words, 1, BITS, CODE, p_table, DTYPE),
            value(words, 2, BITS, CODE, p_table, DTYPE), value(words, 3, BITS, CODE, p_table, DTYPE),
        )  # fmt: skip
    elif BITS == 4:
        return (
            value(words, 0, BITS, CODE, p_table, DTYPE), value(words, 1, BITS, CODE, p_table, DTYPE),
            value(words, 2, BITS, CODE, p_table, DTYPE), value(words, 3, BITS, CODE, p_table, DTYPE),
            value(words, 4, BITS, CODE, p_table, DTYPE), value(words, 5, BITS, CODE, p_table, DTYPE),
            value(words, 6, BITS, CODE, p_table, DTYPE), value(words, 7, BITS, CODE, p_table, DTYPE),
        )  # fmt: skip
    else:
        tl.static_assert(BITS == 2)
        return (
            value(words, 0, BITS, CODE, p_table, DTYPE), value(words, 1, BITS, CODE, p_table, DTYPE),
            value(words, 2, BITS, CODE, p_table, DTYPE), value(words, 3, BITS, CODE, p_table, DTYPE),
            value(words, 4, BITS, CODE, p_table, DTYPE), value(words, 5, BITS, CODE, p_table, DTYPE),
            value(words, 6, BITS, CODE, p_table, DTYPE), value(words, 7, BITS, CODE, p_table, DTYPE),
            value(words, 8, BITS, CODE, p_table, DTYPE), value(words, 9, BITS, CODE, p_table, DTYPE),
            value(words, 10, BITS, CODE, p_table, DTYPE), value(words, 11, BITS, CODE, p_table, DTYPE),
            value(words, 12, BITS, CODE, p_table, DTYPE), value(words, 13, BITS, CODE, p_table, DTYPE),
            value(words, 14, BITS, CODE, p_table, DTYPE), value(words, 15, BITS, CODE, p_table, DTYPE),
        )  # fmt: skip


@triton.jit
def by_asm(words, ASM: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Run the PTX. A tuple of types cannot be made from DTYPE."""
    VALUES: tl.constexpr = 32 // BITS
    FORM: tl.constexpr = "=h," * VALUES + "r"
    if DTYPE == tl.bfloat16:  # noqa: SIM300
        return tl.inline_asm_elementwise(ASM, FORM, [words], dtype=(tl.bfloat16,) * VALUES, is_pure=True, pack=1)
    else:
        return tl.inline_asm_elementwise(ASM, FORM, [words], dtype=(tl.float16,) * VALUES, is_pure=True, pack=1)


@triton.jit
def value(words, J: tl.constexpr, BITS: tl.constexpr, CODE: tl.constexpr, p_table, DTYPE: tl.constexpr):
    """Value J of every word."""
    if CODE == "table":
        return tl.load(p_table + ((words >> (BITS * J)) & (2**BITS - 1))).to(DTYPE)
    code = (words >> (BITS * (J // 2) + 16 * (J % 2))) & (2**BITS - 1)
    if CODE != "int":
        return to_float(code, CODE).to(DTYPE)
    else:
        return (code - 2 ** (BITS - 1)).to(tl.float32).to(DTYPE)


@triton.jit
def columns(v, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Put the unpacked values, each [ROWS, 16], in the order of the columns: [ROWS, 512 / BITS]. Moves nothing between threads."""
    if BITS == 8:
        t = tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3]))  # row, word, e, h
        t = tl.permute(tl.reshape(t, [ROWS, 4, 4, 2, 2]), [0, 2, 4, 1, 3])  # row, s', h, c, e
    elif BITS == 4:
        low = tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3]))
        high = tl.join(tl.join(v[4], v[5]), tl.join(v[6], v[7]))
        t = tl.join(low, high)  # row, word, e, h, s
        t = tl.permute(tl.reshape(t, [ROWS, 4, 4, 2, 2, 2]), [0, 2, 5, 4, 1, 3])  # row, s', s, h, c, e
    else:
        a = tl.join(tl.join(v[0], v[1]), tl.join(v[2], v[3]))
        b = tl.join(tl.join(v[4], v[5]), tl.join(v[6], v[7]))
        c = tl.join(tl.join(v[8], v[9]), tl.join(v[10], v[11]))
        d = tl.join(tl.join(v[12], v[13]), tl.join(v[14], v[15]))
        t = tl.join(tl.join(a, b), tl.join(c, d))  # row, word, e, h, s % 2, s // 2
        t = tl.permute(tl.reshape(t, [ROWS, 4, 4, 2, 2, 2, 2]), [0, 2, 6, 5, 4, 1, 3])
    return tl.reshape(t, [ROWS, 512 // BITS])


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
