"""The words of AWQ's three packings and the codes [N, K] uint8 in them.

Layout:   gemm       [K, N / 8] int32: the nibbles of a word are columns 0 2 4 6 1 3 5 7, from the lowest on
          gemv       [N, K / 8] int32: in order
          gemv_fast  [N / 4, K] int16: (n, k) is nibble k % 32 // 8 of word [n // 4, 64 (k // 64) + 16 (n % 4) + 8 (k % 64 // 32) + k % 8]
"""

from __future__ import annotations

import torch
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.formats.packing import pack, unpack
from qkernels.io import layers

NIBBLES = [0, 2, 4, 6, 1, 3, 5, 7]  # columns of a word of gemm
COLUMNS = [0, 4, 1, 5, 2, 6, 3, 7]  # its inverse


def reordered(nibbles: Tensor, order: list[int]) -> Tensor:
    """Take every 8 along the last axis in another order."""
    return nibbles.unflatten(-1, (-1, 8))[..., order].flatten(-2)


def _unpack_gemm(qweight: Tensor) -> Tensor:
    nibbles = unpack(layers.in_order(qweight).view(torch.uint8), 4, 8 * qweight.shape[1])
    return layers.in_order(reordered(nibbles, COLUMNS).t())


def _pack_gemm(codes: Tensor) -> Tensor:
    return layers.to_words(pack(reordered(codes.t(), NIBBLES), 4))


def _unpack_gemv(qweight: Tensor) -> Tensor:
    return unpack(layers.in_order(qweight).view(torch.uint8), 4, 8 * qweight.shape[1])


def _pack_gemv(codes: Tensor) -> Tensor:
    return layers.to_words(pack(codes, 4))


def _unpack_gemv_fast(qweight: Tensor) -> Tensor:
    quarter, k = qweight.shape
    if k % 64:
        raise CheckpointError(f"qweight has {k} columns; those of gemv_fast are a multiple of 64")
    nibbles = unpack(layers.in_order(qweight).view(torch.uint8), 4, 4 * k)
    # [n // 4, k // 64, n % 4, k % 64 // 32, k % 8, k % 32 // 8] -> n, then k
    return nibbles.view(quarter, k // 64, 4, 2, 8, 4).permute(0, 2, 1, 3, 5, 4).reshape(4 * quarter, k)


def _pack_gemv_fast(codes: Tensor) -> Tensor:
    n, k = codes.shape
    nibbles = codes.view(n // 4, 4, k // 64, 2, 4, 8).permute(0, 2, 1, 3, 5, 4)
    return pack(nibbles.reshape(n // 4, 4 * k), 4).view(torch.int16)


UNPACK = {"gemm": _unpack_gemm, "gemv": _unpack_gemv, "gemv_fast": _unpack_gemv_fast}
PACK = {"gemm": _pack_gemm, "gemv": _pack_gemv, "gemv_fast": _pack_gemv_fast}
