"""ggml's blocks of scalar codes: raw bytes to codes and two levels of scales, and back, bit for bit.

Shapes of every `split_<type>`, and of `join_<type>`, which inverts it:
    raw        [N, B, bytes of a block]    uint8
    returns    Parts (format.py) of [N, B, ...]
Bytes: half floats are little-endian; `planes` is how most codes lie: the low bits of a run of bytes come first, then the next bits of
the same bytes. Source: the block structures of ggml-common.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.formats.format import Codebook, Parts
from qkernels.formats.packing import pack, unpack

IQ4 = Codebook("iq4", (-127.0, -104.0, -83.0, -65.0, -49.0, -35.0, -22.0, -10.0, 1.0, 13.0, 25.0, 38.0, 53.0, 69.0, 89.0, 113.0))


def planes(data: Tensor, bits: int, run: int = 0) -> Tensor:
    """Codes of `bits` bits from runs of `run` bytes (0: all): element p * run + i of a run is field p of its byte i.

    Shapes:
        data       [..., L]               uint8, L a multiple of run
        returns    [..., L * 8 / bits]    uint8
    """
    runs = data.unflatten(-1, (-1, run or data.shape[-1]))
    return torch.cat([(runs >> i) & (2**bits - 1) for i in range(0, 8, bits)], -1).flatten(-2)


def join_planes(codes: Tensor, bits: int, run: int = 0) -> Tensor:
    """Invert `planes`."""
    fields = 8 // bits
    runs = codes.unflatten(-1, (-1, fields, run or codes.shape[-1] // fields))
    data = runs[..., 0, :].clone()
    for i in range(1, fields):
        data |= runs[..., i, :] << (bits * i)
    return data.flatten(-2)


def half(raw: Tensor, at: int) -> Tensor:
    """The float16 at byte `at` of each block, [N, B, 1]."""
    return raw[..., at : at + 2].contiguous().view(torch.float16)


def octets(number: Tensor) -> Tensor:
    """The bytes of numbers of any type."""
    return number.contiguous().view(torch.uint8)


def negated(number: Tensor) -> Tensor:
    """Flip the sign of float16: on the bits, as arithmetic may change a NaN."""
    return (number.contiguous().view(torch.int16) ^ -0x8000).view(torch.float16)


def _joined(*parts: Tensor) -> Tensor:
    return torch.cat([octets(part) for part in parts], -1)


def split_q4_0(raw: Tensor) -> Parts:
    return Parts(planes(raw[..., 2:], 4), half(raw, 0))


def join_q4_0(p: Parts) -> Tensor:
    return _joined(p.d, join_planes(p.codes, 4))


def split_q4_1(raw: Tensor) -> Parts:
    return Parts(planes(raw[..., 4:], 4), half(raw, 0), m=half(raw, 2))


def join_q4_1(p: Parts) -> Tensor:
    assert p.m is not None
    return _joined(p.d, p.m, join_planes(p.codes, 4))


def split_q5_0(raw: Tensor) -> Parts:
    return Parts(planes(raw[..., 6:], 4) | unpack(raw[..., 2:6], 1, 32) << 4, half(raw, 0))


def join_q5_0(p: Parts) -> Tensor:
    return _joined(p.d, pack(p.codes >> 4, 1), join_planes(p.codes & 15, 4))


def split_q5_1(raw: Tensor) -> Parts:
    return Parts(planes(raw[..., 8:], 4) | unpack(raw[..., 4:8], 1, 32) << 4, half(raw, 0), m=half(raw, 2))


def join_q5_1(p: Parts) -> Tensor:
    assert p.m is not None
    return _joined(p.d, p.m, pack(p.codes >> 4, 1), join_planes(p.codes & 15, 4))


def split_q8_0(raw: Tensor) -> Parts:
    return Parts(raw[..., 2:] ^ 0x80, half(raw, 0))  # int8 to a code with bias 128


def join_q8_0(p: Parts) -> Tensor:
    return _joined(p.d, p.codes ^ 0x80)


def split_q2_k(raw: Tensor) -> Parts:
    return Parts(planes(raw[..., 16:80], 2, 32), half(raw, 80), raw[..., :16] & 15, negated(half(raw, 82)), raw[..., :16] >> 4)


def join_q2_k(p: Parts) -> Tensor:
    assert p.scales is not None and p.m is not None and p.mins is not None
    return _joined(p.scales | p.mins << 4, join_planes(p.codes, 2, 32), p.d, negated(p.m))


def split_q3_k(raw: Tensor) -> Parts:
    codes = planes(raw[..., 32:96], 2, 32) | planes(raw[..., :32], 1) << 2
    scales = planes(raw[..., 96:104], 4) | planes(raw[..., 104:108], 2) << 4
    return Parts(codes, half(raw, 108), scales.view(torch.int8) - 32)


def join_q3_k(p: Parts) -> Tensor:
    assert p.scales is not None
    scales = octets(p.scales + 32)
    high, low = join_planes(p.codes >> 2, 1), join_planes(p.codes & 3, 2, 32)
    return _joined(high, low, join_planes(scales & 15, 4), join_planes(scales >> 4, 2), p.d)


def _split_scales(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Eight 6-bit scales and eight 6-bit minima from 12 bytes: the first four of each whole, the high bits of the others above them."""
    scales, mins, rest = raw.split(4, -1)
    scales = torch.cat([scales & 63, rest & 15 | scales >> 6 << 4], -1)
    return scales, torch.cat([mins & 63, rest >> 4 | mins >> 6 << 4], -1)


def _join_scales(p: Parts) -> Tensor:
    assert p.scales is not None and p.mins is not None
    (scales, more_scales), (mins, more_mins) = p.scales.split(4, -1), p.mins.split(4, -1)
    return torch.cat([scales | more_scales >> 4 << 6, mins | more_mins >> 4 << 6, more_scales & 15 | more_mins << 4], -1)


def split_q4_k(raw: Tensor) -> Parts:
    scales, mins = _split_scales(raw[..., 4:16])
    return Parts(planes(raw[..., 16:], 4, 32), half(raw, 0), scales, negated(half(raw, 2)), mins)


def join_q4_k(p: Parts) -> Tensor:
    assert p.m is not None
    return _joined(p.d, negated(p.m), _join_scales(p), join_planes(p.codes, 4, 32))


def split_q5_k(raw: Tensor) -> Parts:
    scales, mins = _split_scales(raw[..., 4:16])
    codes = planes(raw[..., 48:], 4, 32) | planes(raw[..., 16:48], 1) << 4
    return Parts(codes, half(raw, 0), scales, negated(half(raw, 2)), mins)


def join_q5_k(p: Parts) -> Tensor:
    assert p.m is not None
    high, low = join_planes(p.codes >> 4, 1), join_planes(p.codes & 15, 4, 32)
    return _joined(p.d, negated(p.m), _join_scales(p), high, low)


def split_q6_k(raw: Tensor) -> Parts:
    codes = planes(raw[..., :128], 4, 64) | planes(raw[..., 128:192], 2, 32) << 4
    return Parts(codes, half(raw, 208), raw[..., 192:208].contiguous().view(torch.int8))


def join_q6_k(p: Parts) -> Tensor:
    assert p.scales is not None
    return _joined(join_planes(p.codes & 15, 4, 64), join_planes(p.codes >> 4, 2, 32), p.scales, p.d)


def split_iq4_xs(raw: Tensor) -> Parts:
    scales = unpack(raw[..., 4:8], 4, 8) | unpack(raw[..., 2:4], 2, 8) << 4
    return Parts(planes(raw[..., 8:], 4, 16), half(raw, 0), scales.view(torch.int8) - 32)


def join_iq4_xs(p: Parts) -> Tensor:
    assert p.scales is not None
    scales = octets(p.scales + 32)
    return _joined(p.d, pack(scales >> 4, 2), pack(scales & 15, 4), join_planes(p.codes, 4, 16))


def split_mxfp4(raw: Tensor) -> Parts:
    # E8M0 255 is NaN, as OCP says; ggml reads it as 2^128.
    return Parts(planes(raw[..., 1:], 4), raw[..., :1].contiguous().view(torch.float8_e8m0fnu))


def join_mxfp4(p: Parts) -> Tensor:
    return _joined(p.d, join_planes(p.codes, 4))


def split_nvfp4(raw: Tensor) -> Parts:
    # UE4M3 is E4M3 whose sign is never set (ggml ignores the bit). 0x7F is NaN; ggml reads it as 0.
    return Parts(planes(raw[..., 4:], 4, 8), raw[..., :4].contiguous().view(torch.float8_e4m3fn))


def join_nvfp4(p: Parts) -> Tensor:
    return _joined(p.d, join_planes(p.codes, 4, 8))


def split_tq1_0(raw: Tensor) -> Parts:
    # Five trits a byte, as a fraction of 256: threefold, the overflow is the next trit.
    long, short, last = raw[..., :52].split([32, 16, 4], -1)
    trits = [((run * 3**i).int() * 3 >> 8).to(torch.uint8) for run, n in ((long, 5), (short, 5), (last, 4)) for i in range(n)]
    return Parts(torch.cat(trits, -1), half(raw, 52))


def join_tq1_0(p: Parts) -> Tensor:
    """Bytes as ggml makes them; `split_tq1_0` reads several bytes as the same trits, so that this is its inverse only from the left."""
    last = torch.nn.functional.pad(p.codes[..., 240:].unflatten(-1, (4, 4)), (0, 0, 0, 1))
    runs = [p.codes[..., :160].unflatten(-1, (5, 32)), p.codes[..., 160:240].unflatten(-1, (5, 16)), last]
    powers = torch.tensor((81, 27, 9, 3, 1), device=p.codes.device)[:, None]
    numbers = torch.cat([(run * powers).sum(-2) for run in runs], -1)
    return _joined(((numbers * 256 + 242) // 243).to(torch.uint8), p.d)


def split_tq2_0(raw: Tensor) -> Parts:
    return Parts(planes(raw[..., :64], 2, 32), half(raw, 64))


def join_tq2_0(p: Parts) -> Tensor:
    return _joined(join_planes(p.codes, 2, 32), p.d)


def split_q1_0(raw: Tensor) -> Parts:
    return Parts(unpack(raw[..., 2:], 1, 128), half(raw, 0))


def join_q1_0(p: Parts) -> Tensor:
    return _joined(p.d, pack(p.codes, 1))


def split_q2_0(raw: Tensor) -> Parts:
    return Parts(unpack(raw[..., 2:], 2, 64), half(raw, 0))


def join_q2_0(p: Parts) -> Tensor:
    return _joined(p.d, pack(p.codes, 2))
