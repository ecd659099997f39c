"""PTX that turns a word of codes into 16-bit floats; the kernels take it as a compile-time string. Needs sm_80.

Integers: a code OR-ed into the mantissa of a power of two is that power plus the code, so one `lop3` unpacks the two codes of a register's
halves and one addition takes the power away: (128 + q) in bf16, (1024 + q) in fp16. What comes out is code - 2^(bits-1), exactly.
A code of 8 bits is one bit too wide for bf16's mantissa: its highest bit chooses between the constants that are added.
Codes of two planes (3, 5 and 6 bits) are put together by one `lop3` for all of a word's even pairs and one for all odd ones. Each need not
be shifted to bit 0, only to where the mantissa holds it: from bit p, the multiplication that comes with the addition takes 2^p away.

Codebooks: a byte permutation looks four codes up in eight bytes, so two of them, and a choice by the codes' highest bits, look them up in
sixteen; once for the high and once for the low bytes of the values.

FP8: moved to where the wider type has its exponent and mantissa, a code is its value over a power of two. The codes of NaN and infinity
get the exponent of theirs: adding what they lack to the next power of two tells them from the others.

Sources: the magic numbers are FasterTransformer's and Marlin's, looking up by `prmt` is an old trick of table-driven kernels; written anew.
"""

from __future__ import annotations

import torch

from qkernels.formats import Codebook, Float, Int
from qkernels.formats.format import Code
from qkernels.kernels.triton.layout import planes

_POWER = {torch.bfloat16: (128, "43004300"), torch.float16: (1024, "64006400")}
_TYPE = {torch.bfloat16: "bf16x2", torch.float16: "f16x2"}


def unpack_asm(code: Code, dtype: torch.dtype) -> str:
    """The body for one word; operands: its values in order of the columns, the word, and of two planes the narrow word, turned."""
    if isinstance(code, Float) and code.bits == 8:
        pairs = _float8(code, dtype)
    elif not isinstance(code, Int):
        pairs = _table(code, dtype)
    elif planes(code.bits)[1]:
        pairs = _two_planes(code.bits, dtype)
    elif code.bits == 8 and dtype == torch.bfloat16:
        pairs = _int8_bf16()
    else:
        pairs = _int(code.bits, dtype)
    lines = [".reg .b32 s, m, a, b, c, h, l, t, u, one, minus;", f"mov.b32 one, {_pair(1.0, dtype)};"]
    for i, unpacking in enumerate(pairs):
        lines += [*unpacking, f"mov.b32 {{${2 * i}, ${2 * i + 1}}}, t;"]
    return "{\n" + "\n".join(lines) + "\n}"


def base(code: Code) -> int:
    """What the unpacked values of an integer code lack: value = unpacked + base - bias."""
    return 2 ** (code.bits - 1) if isinstance(code, Int) else 0


def _bits(value: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(value, dtype=dtype, device="cpu").view(torch.int16).item()) & 0xFFFF


def _pair(value: float, dtype: torch.dtype) -> str:
    return f"0x{_bits(value, dtype) * 0x10001:08x}"


def _int(bits: int, dtype: torch.dtype) -> list[list[str]]:
    """For every pair of values, the instructions that leave it in register t."""
    return [[f"shr.u32 t, ${32 // bits}, {bits * i};", *_code_at(0, "t", bits, dtype)] for i in range(16 // bits)]


def _two_planes(bits: int, dtype: torch.dtype) -> list[list[str]]:
    """The same for codes of which the word has all but a few bits, and the narrow word those, beside the place of the others."""
    wide, narrow = planes(bits)
    lower = f"0x{int('3' * 8 if wide == 2 else '0f' * 4, 16):08x}"  # of every 2 wide bits
    registers, shifted, pairs = "ab", [0, 0], []  # of the codes of even i, and of odd i
    for i in range(16 // wide):
        odd, lines = i % 2, []
        r, at = registers[odd], wide * i - narrow * odd
        if i < 2:  # lower ? word : narrow word, or the other way round
            lines.append(f"lop3.b32 {r}, {lower}, ${32 // wide}, ${32 // wide + 1}, {('0xca', '0xac')[odd]};")
        if 2 ** (at - shifted[odd] + bits) > _POWER[dtype][0]:  # the mantissa ends there
            lines.append(f"shr.u32 {r}, {r}, {at - shifted[odd]};")
            shifted[odd] = at
        pairs.append([*lines, *_code_at(at - shifted[odd], r, bits, dtype)])
    return pairs


def _code_at(p: int, register: str, bits: int, dtype: torch.dtype) -> list[str]:
    """Codes at bit p of the halves of a register, as floats in register t."""
    power, magic = _POWER[dtype]
    return [
        f"lop3.b32 t, {register}, 0x{(2**bits - 1 << p) * 0x10001:08x}, 0x{magic}, 0xea;",  # (register & mask) | magic
        f"mov.b32 minus, {_pair(-(power / 2**p + 2.0 ** (bits - 1)), dtype)};",
        *([f"mov.b32 c, {_pair(2.0**-p, dtype)};"] if p else []),
        f"fma.rn.{_TYPE[dtype]} t, t, {'c' if p else 'one'}, minus;",
    ]


def _int8_bf16() -> list[list[str]]:
    return [
        [
            f"shr.u32 u, $4, {8 * i};",
            "lop3.b32 t, u, 0x007f007f, 0x43004300, 0xea;",
            "lop3.b32 c, u, 0x00800080, 0xc380c380, 0x6a;",  # (u & mask) ^ -256: -128 where the highest bit is set
            "fma.rn.bf16x2 t, t, one, c;",
        ]
        for i in range(2)
    ]


def _float8(code: Float, dtype: torch.dtype) -> list[list[str]]:
    mantissa, bias = (7, 127) if dtype == torch.bfloat16 else (10, 15)
    shift = mantissa - code.man
    first_not_finite = 0x7F if code.name == "e4m3" else 0x7C
    infinity = _bits(float("inf"), dtype) | (_bits(float("nan"), dtype) if code.name == "e4m3" else 0)
    factor = _pair(2.0 ** (bias - (2 ** (code.exp - 1) - 1)), dtype)
    if shift + 7 == 15:  # e5m2 in fp16: the same but for the mantissa's length
        return [[f"shl.b32 t, $4, {8 - 8 * i};" if i == 0 else "mov.b32 t, $4;", "and.b32 t, t, 0xff00ff00;"] for i in range(2)]
    return [
        [
            f"shr.u32 u, $4, {8 * i};",
            "and.b32 t, u, 0x007f007f;",
            f"add.u32 c, t, 0x{(0x80 - first_not_finite) * 0x10001:08x};",
            "and.b32 c, c, 0x00800080;",
            f"mul.lo.u32 c, c, {infinity // 0x80};",  # every bit of it, where the bit is set
            f"shl.b32 t, t, {shift};",
            "shl.b32 u, u, 8;",
            "lop3.b32 t, u, 0x80008000, t, 0xea;",  # (u & mask) | t
            "or.b32 t, t, c;",
            f"mov.b32 c, {factor};",
            f"mov.b32 u, {_pair(-0.0, dtype)};",
            f"fma.rn.{_TYPE[dtype]} t, t, c, u;",
        ]
        for i in range(2)
    ]


def _table(code: Codebook | Float, dtype: torch.dtype) -> list[list[str]]:
    values = [_bits(v, dtype) for v in code.values]
    pairs = []
    for half in range(2):  # four codes each
        # bytes of the mask: 0xff where the highest bit of a code is set; 8 in a selector repeats the sign of a byte
        lines = [f"shr.u32 s, $8, {16 * half};", "shl.b32 m, s, 4;", "prmt.b32 m, m, s, 0xd9c8;", "and.b32 s, s, 0x7777;"]
        for name, shift in (("h", 8), ("l", 0)):
            words = [int.from_bytes(bytes((v >> shift) & 255 for v in values[i : i + 4]), "little") for i in range(0, 16, 4)]
            lines += [f"mov.b32 a, 0x{words[0]:08x};", f"mov.b32 b, 0x{words[1]:08x};", f"prmt.b32 {name}, a, b, s;"]
            lines += [f"mov.b32 a, 0x{words[2]:08x};", f"mov.b32 b, 0x{words[3]:08x};", "prmt.b32 a, a, b, s;"]
            lines.append(f"lop3.b32 {name}, m, a, {name}, 0xca;")  # m ? a : h
        pairs.append([*lines, "prmt.b32 t, l, h, 0x5140;"])
        pairs.append(["prmt.b32 t, l, h, 0x7362;"])
    return pairs
