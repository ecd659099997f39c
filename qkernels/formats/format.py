"""QuantFormat: what the numbers of a quantised weight mean, as data.

A weight `W [N, K]` is held as one code per element and one scale per group:

    W[n, k] = (value(code[n, k]) - zero[g]) * scale[g] * tensor_scale        g = the group of (n, k)
    W[n, k] = value(code[n, k]) * scale[g] + min[g]                          where the format has minima instead of zero points

Name grammar, one name per meaning:  <code>_g<k>[x<n>][_z<i|f|m>]_s<scale>[_t]

    u4b8_g128_sf16          4-bit unsigned, bias 8, groups of 128 along K, fp16 scales
    u4_g128_zi_sf16         the same with an integer zero point per group
    e4m3_g128x128_sf32      FP8, one fp32 scale per 128 x 128 block; an extent of -1 is the whole axis
    e2m1_g16_se4m3_t        NVFP4: FP8 scales and one fp32 scale per tensor
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import FormatError

ScaleType = Literal["f32", "f16", "bf16", "e4m3", "e8m0"]
ZeroType = Literal["none", "int", "float", "min"]

SCALE_DTYPES: dict[str, torch.dtype] = {
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "e4m3": torch.float8_e4m3fn,
    "e8m0": torch.float8_e8m0fnu,
}


def scale_type(dtype: torch.dtype) -> ScaleType:
    """The scale type of a dtype: "f16" of torch.float16; FormatError for one that no scale has."""
    for name, known in SCALE_DTYPES.items():
        if known == dtype:
            return name  # type: ignore[return-value]  # a key is one of the literals
    raise FormatError(f"scales of {dtype} are not held; {', '.join(map(str, SCALE_DTYPES.values()))} are")


@dataclass(frozen=True)
class Int:
    """An unsigned integer code; its value is `code - bias`."""

    bits: int
    bias: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise FormatError(f"integer codes have 1 to 8 bits, not {self.bits}")
        if not 0 <= self.bias < 2**self.bits:
            raise FormatError(f"the bias of a {self.bits}-bit code lies in 0…{2**self.bits - 1}, not {self.bias}")

    @property
    def name(self) -> str:
        return f"u{self.bits}" + (f"b{self.bias}" if self.bias else "")

    @property
    def values(self) -> tuple[float, ...]:
        return tuple(float(code - self.bias) for code in range(2**self.bits))


@dataclass(frozen=True)
class Float:
    """A small float: sign, `exp` exponent bits, `man` mantissa bits.

    As the OCP formats define them: e4m3 has one NaN per sign and no infinity, e5m2 is IEEE, narrower ones have neither.
    """

    exp: int
    man: int

    def __post_init__(self) -> None:
        if not (1 <= self.exp <= 5 and 0 <= self.man <= 3 and self.bits <= 8):
            raise FormatError(f"float codes have 1 to 5 exponent and 0 to 3 mantissa bits, not e{self.exp}m{self.man}")

    @property
    def bits(self) -> int:
        return 1 + self.exp + self.man

    @property
    def name(self) -> str:
        return f"e{self.exp}m{self.man}"

    @property
    def values(self) -> tuple[float, ...]:
        positive = [self._magnitude(code) for code in range(2 ** (self.bits - 1))]
        return tuple(positive + [-v for v in positive])

    def _magnitude(self, code: int) -> float:
        exponent, mantissa = code >> self.man, code & (2**self.man - 1)
        bias, top = 2 ** (self.exp - 1) - 1, 2**self.exp - 1
        if self.name == "e5m2" and exponent == top:
            return float("nan") if mantissa else float("inf")
        if self.name == "e4m3" and code == 0x7F:
            return float("nan")
        fraction = mantissa / 2**self.man
        return fraction * 2.0 ** (1 - bias) if exponent == 0 else (1 + fraction) * 2.0 ** (exponent - bias)


@dataclass(frozen=True)
class Codebook:
    """A named table of 2^bits values; the code is the index."""

    name: str
    values: tuple[float, ...]

    def __post_init__(self) -> None:
        if len(self.values) not in (2, 4, 8, 16):
            raise FormatError(f"codebook {self.name} has {len(self.values)} values; 2, 4, 8 or 16 are possible")

    @property
    def bits(self) -> int:
        return (len(self.values) - 1).bit_length()


Code = Int | Float | Codebook


class Parts(NamedTuple):
    """What the bytes of nested blocks say: element e of a block is value(code[e]) * (d * scale[e]) + m * min[e].

    Shapes, with B blocks of E elements; D, S and M divide E, and each number serves as many elements as there are to one:
        codes    [N, B, E]    uint8
        d        [N, B, D]    float16, float8 or float32
        scales   [N, B, S]    int8 or uint8; None is 1
        m        [N, B, M]    float16, its sign included; None: there is no minimum
        mins     [N, B, S]    uint8; None is 1
    """

    codes: Tensor
    d: Tensor
    scales: Tensor | None = None
    m: Tensor | None = None
    mins: Tensor | None = None


@dataclass(frozen=True)
class Block:
    """A family with nested blocks (ggml's): raw bytes per `elements` weights along K; `QuantFormat.code` says what its codes mean.

    split    raw [N, B, nbytes] uint8 -> Parts
    join     its inverse, bit for bit; None where several bytes give the same parts (vector codebooks), and only raw bytes can be kept
    encode   weights [N, B, elements] float32 -> raw; None: the family can be read, not made
    """

    elements: int
    nbytes: int
    split: Callable[[Tensor], Parts]
    join: Callable[[Parts], Tensor] | None = None
    encode: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class QuantFormat:
    """What the numbers of a quantised weight mean; hashable, checks itself.

    code          Int, Float or Codebook
    group         (n, k): the extent along N and along K that shares one scale; -1 is the whole axis
    scale         type of the scales: f32 f16 bf16 e4m3 e8m0
    zero          "none", "int" (uint8 per group), "float" (in the scales' type) or "min" (in the scales' type: added, not multiplied)
    tensor_scale  one more fp32 scale for the whole tensor (NVFP4)
    block         set for nested block families, whose bytes tell all but the code; then group, scale and zero say nothing
    name          made from the fields, except for block families, which bring theirs
    """

    code: Code
    group: tuple[int, int] = (1, -1)
    scale: ScaleType = "f32"
    zero: ZeroType = "none"
    tensor_scale: bool = False
    block: Block | None = None
    name: str = ""

    def __post_init__(self) -> None:
        if self.block is not None:
            if not self.name:
                raise FormatError("a block format needs a name of its own")
            return
        for axis, extent in zip("NK", self.group, strict=True):
            if extent != -1 and extent < 1:
                raise FormatError(f"the group along {axis} is -1 or at least 1, not {extent}")
        if self.scale not in SCALE_DTYPES:
            raise FormatError(f"unknown scale type {self.scale!r}; known: {', '.join(SCALE_DTYPES)}")
        if self.zero not in _ZEROS.values():
            raise FormatError(f"unknown zero {self.zero!r}; known: {', '.join(_ZEROS.values())}")
        if self.zero != "none" and not isinstance(self.code, Int):
            raise FormatError(f"zero points go with integer codes, not with {self.code.name}")
        if self.zero != "none" and self.scale not in ("f32", "f16", "bf16"):
            raise FormatError(f"zero points need f32, f16 or bf16 scales, not {self.scale}")
        if self.zero == "int" and isinstance(self.code, Int) and self.code.bias:
            raise FormatError("a code with a bias has its zero point already: use a code without bias")
        grammar_name = _format_name(self)
        if self.name not in ("", grammar_name):
            raise FormatError(f"a format of these fields is called {grammar_name!r}, not {self.name!r}")
        object.__setattr__(self, "name", grammar_name)

    def __hash__(self) -> int:
        return hash(self.name)  # a string keeps its hash; the fields' would be worked out on every call of a layer

    def __deepcopy__(self, memo: object) -> QuantFormat:
        return self  # immutable: copies of a layer find what is kept by format without comparing fields

    @property
    def bits(self) -> int:
        return self.code.bits

    def group_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape of the scales of an [N, K] weight: (groups along N, groups along K)."""
        group_n, group_k = self.group_extent(n, k)
        return -(-n // group_n), -(-k // group_k)

    def group_extent(self, n: int, k: int) -> tuple[int, int]:
        """The group (n, k) with -1 resolved; never longer than the axis."""
        group_n, group_k = self.group
        return (n if group_n == -1 else min(group_n, n)), (k if group_k == -1 else min(group_k, k))

    def codes_shape(self, n: int, k: int) -> tuple[int, int]:
        """Shape in bytes of the canonical codes of an [N, K] weight."""
        if self.block is None:
            return n, -(-k * self.bits // 8)
        if k % self.block.elements:
            raise FormatError(f"{self.name} holds K in blocks of {self.block.elements}; K = {k} is no multiple of it")
        return n, k // self.block.elements * self.block.nbytes

    def nbytes(self, n: int, k: int) -> int:
        """Bytes that the canonical tensors of an [N, K] weight take, without a permutation."""
        codes = self.codes_shape(n, k)
        total = codes[0] * codes[1]
        if self.block is None:
            groups_n, groups_k = self.group_shape(n, k)
            scale_bytes = SCALE_DTYPES[self.scale].itemsize
            zero_bytes = {"none": 0, "int": 1}.get(self.zero, scale_bytes)
            total += groups_n * groups_k * (scale_bytes + zero_bytes) + 4 * self.tensor_scale
        return total

    def bits_per_weight(self, n: int = 4096, k: int = 4096) -> float:
        return 8 * self.nbytes(n, k) / (n * k)


_NAME = re.compile(
    r"(?P<code>u(?P<bits>\d)(b(?P<bias>\d+))?|e(?P<exp>\d)m(?P<man>\d)|(?P<book>[a-z][a-z0-9]*))"
    r"_g(?P<k>-1|\d+)(x(?P<n>-1|\d+))?(_z(?P<zero>[ifm]))?_s(?P<scale>f32|f16|bf16|e4m3|e8m0)(?P<tensor>_t)?"
)
_ZEROS: dict[str | None, ZeroType] = {None: "none", "i": "int", "f": "float", "m": "min"}


def _format_name(f: QuantFormat) -> str:
    n, k = f.group
    zero = {"none": "", "int": "_zi", "float": "_zf", "min": "_zm"}[f.zero]
    return f"{f.code.name}_g{k}{f'x{n}' if n != 1 else ''}{zero}_s{f.scale}{'_t' if f.tensor_scale else ''}"


@lru_cache(maxsize=1024)
def parse(name: str, codebooks: tuple[Codebook, ...] = ()) -> QuantFormat | None:
    """Return the format that `name` spells in the grammar, or None when it does not follow it."""
    m = _NAME.fullmatch(name)
    if m is None:
        return None
    code: Code | None
    if m["bits"]:
        code = Int(int(m["bits"]), int(m["bias"] or 0))
    elif m["exp"]:
        code = Float(int(m["exp"]), int(m["man"]))
    else:
        code = next((book for book in codebooks if book.name == m["book"]), None)
    if code is None:
        return None
    scale: ScaleType = m["scale"]  # type: ignore[assignment]  # the pattern admits the literals only
    return QuantFormat(code, (int(m["n"] or 1), int(m["k"])), scale, _ZEROS[m["zero"]], bool(m["tensor"]))
