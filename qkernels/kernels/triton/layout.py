"""The packed layout of the Triton kernels, and its inverse.

Codes of B = 2, 4 and 8 bits lie in tiles of T = 512 / B columns: in each, every output row is 16 words of 32 bits, 64 bytes, and the rows
follow each other without gaps. In what order: that of the left operand of a tensor core, whose lane c of four holds columns
16 j + 8 h + 2 c + e of a row. A lane loads its four words as 16 bytes and finds in them the columns that it has to multiply:

    column 16 (J s' + s) + 8 h + 2 c + e  ->  word 4 c + s', code 2 i + e, i = 2 s + h      c, s' < 4; h, e < 2; J = T / 64 steps a word
    tables of 4 bits  code j of a word lies at bit 4 j               (the selectors of a byte permutation)
    all others        code 2 i + e of a word lies at bit B i + 16 e  (one mask gives the pair e = 0, 1 in the halves of a register)

Codes of 3, 5 and 6 bits come in two planes: a tile has first the wide one of B = 2, 4 and 4 bits, laid out as above, then the narrow one
of the C = 1, 1 and 2 bits left. R = B / C wide words share a narrow one, so a row has 16 / R of these, and lane c loads its own as 8 or 4
bytes. Of code 2 i + e of wide word w

    even i  the lower B bits are in the wide word, the upper C in the narrow one, at bit B i + 16 e + B - 2 C (w % R), mod 32
    odd i   the upper B bits are in the wide word, the lower C in the narrow one, at bit B i + 16 e - C - 2 C (w % R), mod 32

Turned left by 2 C (w % R), a narrow word has its bits right beside the place of the wide ones: in every 2 B bits, the lower B of the wide
word and the upper of the narrow one make the code of an even i, the lower of the narrow and the upper of the wide that of an odd one.

K is padded to whole tiles with code 0. Scales, zeros and minima lie in the same order: for every tile, or for every group if those are
wider, one run of its groups for each row, or for each block of rows that share them.

Nested blocks (ggml's) come apart into the same (formats/nested.py). Where a block has a scale of its scales, these are bytes, and that of
every block lies as scales of groups do, with the scale of its minima, if it has one, in the upper half of the same word.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats import Int, QuantFormat, QuantTensor, nested
from qkernels.formats.format import SCALE_DTYPES, Code, ZeroType, scale_type
from qkernels.formats.packing import in_order, pack, unpack
from qkernels.kernels.registry import Problem

WORDS = 16  # of a row in a tile, in its wide plane
LEAST_GROUP = 16  # where a tile has several
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # padding and transposing work for these, not for every 8-bit float


class Packed(NamedTuple):
    """A weight as the Triton kernels read it.

    Shapes, with T columns a tile, and Q = N rows, or blocks of rows that share scales:
        weight        [ceil(K / T), N W]       int32; W = 16 words a row, and those of its narrow plane, which follows the whole wide one
        scales        [S, Q, P]                uint8 for e4m3 and e8m0, else the scale type; P groups a tile and S tiles, or S groups
        zeros         [S, Q, P]                uint8 or the scale type; minima as well, unless scales have them in their bytes
        tensor_scale  [1]                      float32; or what multiplies the scales of a nested block, and its minima:
                      [B, N]                   float16 or, where there are both, int32
        perm          [K]                      int32
    """

    format: QuantFormat
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None
    perm: Tensor | None


class Held(NamedTuple):
    """What the layout holds of a format: what its fields say, or its blocks do.

    scale    a scale type; "i8", "u8" or "u4" where scales are whole numbers, which a float16 of their block multiplies; "u4" is the lower
             half of a byte, of which the minimum has the upper
    columns  of a block that has such a number; 0: there is none
    zero     "min" where there are minima
    """

    code: Code
    scale: str
    zero: ZeroType
    columns: int = 0


@functools.lru_cache(maxsize=1024)
def held(format: QuantFormat) -> Held:
    """For any format of which `why_not` says nothing."""
    code = Int(2, 2) if _is_sign(format.code) else format.code
    if format.block is None:
        return Held(code, format.scale, format.zero)
    parts = nested.parts_of(format)
    zero: ZeroType = "none" if parts.m is None else "min"
    if parts.scales is None:
        return Held(code, scale_type(parts.d.dtype), zero)
    half = parts.mins is not None and max(int(parts.scales.max()), int(parts.mins.max())) < 16
    return Held(code, "u4" if half else "i8" if parts.scales.dtype == torch.int8 else "u8", zero, format.block.elements)


def _is_sign(code: Code) -> bool:
    """Whether codes of one bit are -1 and 1, which the layout holds as integers of 2 bits."""
    return code.values == (-1.0, 1.0)


def planes(bits: int) -> tuple[int, int]:
    """Bits of the wide plane, the largest power of two, and of the narrow one: 0 where the wide one has all."""
    wide = 1 << (bits.bit_length() - 1)
    return wide, bits - wide


def tile_columns(format: QuantFormat) -> int:
    """Columns of a tile."""
    return 32 * WORDS // planes(held(format).code.bits)[0]


def words_per_row(format: QuantFormat) -> int:
    """Words of a row in a tile, those of the narrow plane included."""
    wide, narrow = planes(held(format).code.bits)
    return WORDS + WORDS * narrow // wide


def groups_per_tile(format: QuantFormat, n: int, k: int) -> int:
    """Groups of a row within one tile: 1 where a group fills a tile or more."""
    group = format.group_extent(n, k)[1]
    return 1 if group == k else max(1, tile_columns(format) // group)


def is_table(code: Code) -> bool:
    """Whether codes are looked up: codebooks and floats of 4 bits."""
    return code.bits == 4 and not isinstance(code, Int)


def prepare(q: QuantTensor) -> Packed:
    """Re-lay a canonical weight in tiles."""
    n, k = q.shape
    codes, scales, zeros, outer = _numbers(q)
    codes = F.pad(codes, (0, -k % tile_columns(q.format)))
    steps = tile_columns(q.format) // 64
    split = codes.view(n, -1, 4, steps, 2, 4, 2).permute(1, 0, 5, 2, 3, 4, 6)  # tile, row, c, s', s, h, e
    weight = _words(split.reshape(-1, n, WORDS, 4 * steps), q.format)
    scales = _tiled(scales, groups_per_tile(q.format, n, k))
    zeros = None if zeros is None else _tiled(zeros, groups_per_tile(q.format, n, k))
    if weight.is_cuda:  # a kernel may fetch weights while the one before it still ends: that one must not be who writes them
        torch.cuda.current_stream(weight.device).synchronize()
    scales = scales.view(torch.uint8) if scales.is_floating_point() and scales.element_size() == 1 else scales
    return Packed(q.format, q.shape, weight, scales, zeros, q.tensor_scale if outer is None else outer, q.perm)


def restore(packed: Packed) -> QuantTensor:
    """Invert `prepare`, bit for bit."""
    format, (n, k) = packed.format, packed.shape
    steps = tile_columns(format) // 64
    split = _codes(packed.weight, format, n).view(-1, n, 4, 4, steps, 2, 2)
    codes = split.permute(1, 0, 3, 4, 5, 2, 6).reshape(n, -1)[:, :k].contiguous()
    codes = codes >> 1 if _is_sign(format.code) else codes
    scales = _canonical(packed.scales, format, n, k)
    zeros = None if packed.zeros is None else _canonical(packed.zeros, format, n, k)
    if format.block is not None:
        if held(format).scale == "u4":
            scales, zeros = scales & 15, scales >> 4
        blocks = nested.joined(format, nested.Apart(codes, scales, zeros, _by_rows(packed)))
        return QuantTensor(format, packed.shape, blocks, perm=packed.perm)
    scales = scales.view(SCALE_DTYPES[format.scale])
    return QuantTensor(format, packed.shape, pack(codes, format.bits), scales, zeros, packed.tensor_scale, packed.perm)


def _numbers(q: QuantTensor) -> nested.Apart:
    """Codes as they are held [N, K]; scales and zeros or minima [Q, G]; what multiplies those of nested blocks, as `Packed` has it."""
    if q.format.block is None:
        assert q.scales is not None
        a = nested.Apart(unpack(q.codes, q.format.bits, q.shape[1]), q.scales, q.zeros, None)
    else:
        a = nested.apart(q)
    codes = a.codes << 1 | 1 if _is_sign(q.format.code) else a.codes
    if a.outer is None:
        return a._replace(codes=codes)
    both = 1 if a.minima is None else 2
    outer = _tiled(a.outer, both).view(torch.float16 if both == 1 else torch.int32).squeeze(2)
    if held(q.format).scale == "u4":
        assert a.minima is not None
        return nested.Apart(codes, a.scales | a.minima << 4, None, outer)
    return a._replace(codes=codes, outer=outer)


def _by_rows(packed: Packed) -> Tensor | None:
    """What multiplies the scales of nested blocks, and the minima, as `nested.Apart` has it."""
    if packed.tensor_scale is None:
        return None
    return in_order(packed.tensor_scale.t()).view(torch.float16)


def rows(packed: Packed, index: Tensor) -> QuantTensor:
    """Take rows [R] out, canonical: `take(restore(packed), index)` of a format whose rows have scales of their own, without the others."""
    (n, k), weight = packed.shape, packed.weight
    planes = (plane.reshape(len(weight), n, plane.shape[1] // n) for plane in weight.tensor_split([n * WORDS], 1))
    zeros = None if packed.zeros is None else packed.zeros[:, index]
    words = torch.cat([plane[:, index].flatten(1) for plane in planes], 1)
    outer = packed.tensor_scale  # of blocks that are nested one a row and block, of others one for all
    outer = outer if outer is None or packed.format.block is None else outer[:, index]
    return restore(packed._replace(shape=(len(index), k), weight=words, scales=packed.scales[:, index], zeros=zeros, tensor_scale=outer))


def _words(codes: Tensor, format: QuantFormat) -> Tensor:
    """The codes of every word [tiles, N, 16, 32 / B] -> planes [tiles, N W] int32."""
    (wide, narrow), bits = planes(held(format).code.bits), _wide_bits(format)
    if not narrow:
        return _pack_words(codes, wide, bits)
    odd = _odd(codes)
    beside = torch.where(odd, codes & (2**narrow - 1), codes >> wide)
    codes = torch.where(odd, codes >> narrow, codes & (2**wide - 1))
    shared = beside.unflatten(2, (-1, wide // narrow)).flatten(3)
    return torch.cat([_pack_words(codes, wide, bits), _pack_words(shared, narrow, _narrow_bits(format))], 1)


def _codes(weight: Tensor, format: QuantFormat, n: int) -> Tensor:
    """Invert `_words`."""
    (wide, narrow), bits = planes(held(format).code.bits), _wide_bits(format)
    words = weight.view(torch.uint8).unflatten(1, (-1, 4))
    codes = unpack(words[:, : n * WORDS], wide, 32 // wide)[..., bits // wide]
    if not narrow:
        return codes
    beside = unpack(words[:, n * WORDS :], narrow, 32 // narrow)[..., _narrow_bits(format) // narrow].view(codes.shape)
    return torch.where(_odd(codes), codes << narrow | beside, beside << wide | codes)


def _pack_words(codes: Tensor, width: int, bits: Tensor) -> Tensor:
    """Codes [tiles, N, words, 32 / width], of which code j goes to bit bits[j] -> int32 [tiles, N words]."""
    return pack(codes[..., bits.argsort()], width).view(torch.int32).flatten(1)


def _wide_bits(format: QuantFormat) -> Tensor:
    """Where a word has its codes."""
    wide = planes(held(format).code.bits)[0]
    code = torch.arange(32 // wide)
    return wide * code if is_table(held(format).code) else wide * (code // 2) + 16 * (code % 2)


def _narrow_bits(format: QuantFormat) -> Tensor:
    """Where a narrow word has its bits of the codes of R words, one word after the other."""
    wide, narrow = planes(held(format).code.bits)
    bits = _wide_bits(format)
    turned = bits + torch.where(_odd(bits), -narrow, wide)
    return ((turned - 2 * narrow * torch.arange(wide // narrow)[:, None]) % 32).flatten()


def _odd(codes: Tensor) -> Tensor:
    """Whether i of the codes 2 i + e, the last axis, is odd."""
    return torch.arange(codes.shape[-1], device=codes.device) // 2 % 2 == 1


def _tiled(per_group: Tensor, per_tile: int) -> Tensor:
    """[Q, G] -> [S, Q, P]."""
    raw = per_group.view(_INTS[per_group.element_size()])
    padded = F.pad(raw, (0, -raw.shape[1] % per_tile))
    return padded.view(len(raw), -1, per_tile).transpose(0, 1).contiguous().view(per_group.dtype)


def _canonical(tiled: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    raw, (rows, groups) = tiled.view(_INTS[tiled.element_size()]), format.group_shape(n, k)
    return raw.transpose(0, 1).reshape(rows, -1)[:, :groups].contiguous().view(tiled.dtype)


def why_not(p: Problem) -> str | None:
    """What the layout cannot hold."""
    if nested.is_kept(p.format):
        return f"{p.format.name} does not come apart into codes and scales from which its bytes can be made again"
    if p.format.block is not None and (reason := nested.why_not(p.format)):
        return reason
    code = held(p.format).code
    if not (isinstance(code, Int) and code.bits in (2, 3, 4, 5, 6, 8)) and not is_table(code) and code.name not in ("e4m3", "e5m2"):
        return f"code {code.name} has {code.bits} bits; integers of 2 to 6 and of 8 bits, tables of 4 bits, e4m3 and e5m2 are held"
    group = p.format.group_extent(p.n, p.k)[1]
    tile = tile_columns(p.format)
    if group < p.k and group % tile and (tile % group or group < LEAST_GROUP):
        return f"groups of {group}; of {code.bits} bits, multiples of {tile} and divisors of it down to {LEAST_GROUP} are held"
    return None


def why_not_plain(p: Problem) -> str | None:
    """What is held, and read by the kernels in Triton alone."""
    if p.format.block is not None:
        return f"{p.format.name} has nested blocks, which the Triton kernels read"
    return "minima in place of zero points, which the Triton kernels read" if p.format.zero == "min" else None
