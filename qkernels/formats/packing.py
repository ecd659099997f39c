"""Canonical bit packing: the only shifts of the package outside its kernels.

One little-endian bit stream along the last axis: code j occupies bits j*bits … (j+1)*bits - 1 of its row, and bit b of a row is
bit b % 8 of byte b // 8. So even 4-bit codes lie in the low nibble, and 8 codes of any width fill exactly `bits` bytes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack codes into bytes.

    Shapes:
        codes      [..., K]                     uint8, each < 2^bits
        returns    [..., ceil(K * bits / 8)]    uint8
    Layout:        k -> bit k * bits of the row    # tested
    """
    if bits == 8:
        return codes.contiguous()
    k = codes.shape[-1]
    octets = F.pad(codes, (0, -k % 8)).unflatten(-1, (-1, 8))
    if bits in (1, 2, 4):  # codes never straddle bytes: no need of wide words
        per_byte = octets.flatten(-2).unflatten(-1, (-1, 8 // bits))
        packed = per_byte[..., 0].clone()
        for i in range(1, 8 // bits):
            packed |= per_byte[..., i] << (bits * i)
    else:
        words = torch.zeros(octets.shape[:-1], dtype=torch.int64, device=codes.device)
        for i in range(8):
            words |= octets[..., i].to(torch.int64) << (bits * i)
        packed = torch.stack([(words >> (8 * j)).to(torch.uint8) for j in range(bits)], -1).flatten(-2)
    return packed[..., : -(-k * bits // 8)].contiguous()


def unpack(packed: Tensor, bits: int, k: int) -> Tensor:
    """Invert `pack`.

    Shapes:
        packed     [..., ceil(K * bits / 8)]    uint8
        returns    [..., K]                     uint8
    """
    if bits == 8:
        return packed[..., :k].contiguous()
    mask = 2**bits - 1
    if bits in (1, 2, 4):
        codes = torch.stack([(packed >> (bits * i)) & mask for i in range(8 // bits)], -1).flatten(-2)
    else:
        octets = F.pad(packed, (0, -packed.shape[-1] % bits)).unflatten(-1, (-1, bits))
        words = torch.zeros(octets.shape[:-1], dtype=torch.int64, device=packed.device)
        for j in range(bits):
            words |= octets[..., j].to(torch.int64) << (8 * j)
        codes = torch.stack([((words >> (bits * i)) & mask).to(torch.uint8) for i in range(8)], -1).flatten(-2)
    return codes[..., :k].contiguous()


def swap_nibbles(packed: Tensor) -> Tensor:
    """Exchange the nibbles of every byte, for files that hold the first of two 4-bit codes in the high one: uint8 -> uint8, as shaped."""
    return (packed << 4) | (packed >> 4)
