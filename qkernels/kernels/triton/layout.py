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

K is padded to whole tiles with code 0. Scales and zeros lie in the same order: for every tile, or for every group if those are wider, one
run of its groups for each row, or for each block of rows that share them.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.format import SCALE_DTYPES, Code
from qkernels.formats.packing import pack, unpack
from qkernels.kernels.registry import Problem

WORDS = 16  # of a row in a tile, in its wide plane
_INTS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}  # padding and transposing work for these, not for every 8-bit float


class Packed(NamedTuple):
    """A weight as the Triton kernels read it.

    Shapes, with T columns a tile, and Q = N rows, or blocks of rows that share scales:
        weight        [ceil(K / T), N W]       int32; W = 16 words a row, and those of its narrow plane, which follows the whole wide one
        scales        [S, Q, P]                uint8 for e4m3 and e8m0, else the scale type; P groups a tile and S tiles, or S groups
        zeros         [S, Q, P]                uint8 or the scale type
        tensor_scale  [1]                      float32
        perm          [K]                      int32
    """

    format: QuantFormat
    shape: tuple[int, int]
    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None
    perm: Tensor | None


def planes(bits: int) -> tuple[int, int]:
    """Bits of the wide plane, the largest power of two, and of the narrow one: 0 where the wide one has all."""
    wide = 1 << (bits.bit_length() - 1)
    return wide, bits - wide


def tile_columns(format: QuantFormat) -> int:
    """Columns of a tile."""
    return 32 * WORDS // planes(format.bits)[0]


def words_per_row(format: QuantFormat) -> int:
    """Words of a row in a tile, those of the narrow plane included."""
    wide, narrow = planes(format.bits)
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
    (n, k), bits = q.shape, q.format.bits
    assert q.scales is not None
    codes = F.pad(unpack(q.codes, bits, k), (0, -k % tile_columns(q.format)))
    steps = tile_columns(q.format) // 64
    split = codes.view(n, -1, 4, steps, 2, 4, 2).permute(1, 0, 5, 2, 3, 4, 6)  # tile, row, c, s', s, h, e
    weight = _words(split.reshape(-1, n, WORDS, 4 * steps), q.format)
    scales = _tiled(q.scales, q.format, n, k)
    zeros = None if q.zeros is None else _tiled(q.zeros, q.format, n, k)
    if weight.is_cuda:  # a kernel may fetch weights while the one before it still ends: that one must not be who writes them
        torch.cuda.current_stream(weight.device).synchronize()
    return Packed(
        q.format, q.shape, weight, scales.view(torch.uint8) if scales.element_size() == 1 else scales,
        zeros, q.tensor_scale, q.perm,
    )  # fmt: skip


def restore(packed: Packed) -> QuantTensor:
    """Invert `prepare`, bit for bit."""
    format, (n, k) = packed.format, packed.shape
    steps = tile_columns(format) // 64
    split = _codes(packed.weight, format, n).view(-1, n, 4, 4, steps, 2, 2)
    codes = split.permute(1, 0, 3, 4, 5, 2, 6).reshape(n, -1)[:, :k]
    scales = _canonical(packed.scales, format, n, k).view(SCALE_DTYPES[format.scale])
    zeros = None if packed.zeros is None else _canonical(packed.zeros, format, n, k)
    return QuantTensor(format, packed.shape, pack(codes.contiguous(), format.bits), scales, zeros, packed.tensor_scale, packed.perm)


def rows(packed: Packed, index: Tensor) -> QuantTensor:
    """Take rows [R] out, canonical: `take(restore(packed), index)` of a format whose rows have scales of their own, without the others."""
    (n, k), weight = packed.shape, packed.weight
    planes = (plane.reshape(len(weight), n, plane.shape[1] // n) for plane in weight.tensor_split([n * WORDS], 1))
    zeros = None if packed.zeros is None else packed.zeros[:, index]
    words = torch.cat([plane[:, index].flatten(1) for plane in planes], 1)
    return restore(packed._replace(shape=(len(index), k), weight=words, scales=packed.scales[:, index], zeros=zeros))


def _words(codes: Tensor, format: QuantFormat) -> Tensor:
    """The codes of every word [tiles, N, 16, 32 / B] -> planes [tiles, N W] int32."""
    (wide, narrow), bits = planes(format.bits), _wide_bits(format)
    if not narrow:
        return _pack_words(codes, wide, bits)
    odd = _odd(codes)
    beside = torch.where(odd, codes & (2**narrow - 1), codes >> wide)
    codes = torch.where(odd, codes >> narrow, codes & (2**wide - 1))
    shared = beside.unflatten(2, (-1, wide // narrow)).flatten(3)
    return torch.cat([_pack_words(codes, wide, bits), _pack_words(shared, narrow, _narrow_bits(format))], 1)


def _codes(weight: Tensor, format: QuantFormat, n: int) -> Tensor:
    """Invert `_words`."""
    (wide, narrow), bits = planes(format.bits), _wide_bits(format)
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
    wide = planes(format.bits)[0]
    code = torch.arange(32 // wide)
    return wide * code if is_table(format.code) else wide * (code // 2) + 16 * (code % 2)


def _narrow_bits(format: QuantFormat) -> Tensor:
    """Where a narrow word has its bits of the codes of R words, one word after the other."""
    wide, narrow = planes(format.bits)
    bits = _wide_bits(format)
    turned = bits + torch.where(_odd(bits), -narrow, wide)
    return ((turned - 2 * narrow * torch.arange(wide // narrow)[:, None]) % 32).flatten()


def _odd(codes: Tensor) -> Tensor:
    """Whether i of the codes 2 i + e, the last axis, is odd."""
    return torch.arange(codes.shape[-1], device=codes.device) // 2 % 2 == 1


def _tiled(per_group: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    """[Q, G] -> [S, Q, P]."""
    per_tile = groups_per_tile(format, n, k)
    raw = per_group.view(_INTS[per_group.element_size()])
    padded = F.pad(raw, (0, -raw.shape[1] % per_tile))
    return padded.view(len(raw), -1, per_tile).transpose(0, 1).contiguous().view(per_group.dtype)


def _canonical(tiled: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    raw, (rows, groups) = tiled.view(_INTS[tiled.element_size()]), format.group_shape(n, k)
    return raw.transpose(0, 1).reshape(rows, -1)[:, :groups].contiguous().view(tiled.dtype)


def why_not(p: Problem) -> str | None:
    """What the layout cannot hold."""
    if p.format.zero == "min":
        return "minima in place of zero points are not held"
    if p.format.block is not None:
        return f"{p.format.name} keeps its blocks; codes of one width and groups are held"
    bits, code = p.format.bits, p.format.code
    if not (isinstance(code, Int) and bits in (2, 3, 4, 5, 6, 8)) and not is_table(code) and code.name not in ("e4m3", "e5m2"):
        return f"code {code.name} has {bits} bits; integers of 2 to 6 and of 8 bits, tables of 4 bits, e4m3 and e5m2 are held"
    group = p.format.group_extent(p.n, p.k)[1]
    tile = tile_columns(p.format)
    least = tile // 4 if tile == 64 else tile // 8  # two groups a word: its columns' halves
    if group < p.k and group % tile and (tile % group or group < least):
        return f"groups of {group}; of {bits} bits, multiples of {tile} and divisors of it down to {least} are held"
    return None
