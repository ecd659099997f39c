"""torch itself: F.linear in bf16 and fp32, and aten's two weight-only kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..base import Contestant, Prepared, groupwise, nbytes_of

GROUP = 128
INNER_K_TILES = 2  # demanded by the packing function, without effect on CPU


def linear(dtype: torch.dtype, weight: Tensor) -> Prepared:
    """F.linear with a weight of the given type."""
    cast = weight.to(dtype)

    def make():
        copy = cast.clone()
        return lambda x: F.linear(x, copy)

    return Prepared(cast.float(), cast.nbytes, make)


def int4(weight: Tensor, threads: int) -> Prepared:
    """aten::_weight_int4pack_mm_for_cpu: value = (code - 8) * scale + zero, scale and zero in bf16 per group of 128."""
    n, k = weight.shape
    blocks = weight.view(n, k // GROUP, GROUP)
    low, high = blocks.amin(dim=2), blocks.amax(dim=2)
    scales = ((high - low).clamp(min=1e-8) / 15).bfloat16()
    zeros = (low + 8 * scales.float()).bfloat16()
    shifted = (blocks - zeros.float()[..., None]) / scales.float()[..., None]
    codes = (shifted + 8).round().clamp(0, 15)
    meaning = ((codes - 8) * scales.float()[..., None] + zeros.float()[..., None]).view(n, k)
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.view(n, k).to(torch.int32), INNER_K_TILES)
    pairs = torch.stack([scales.T, zeros.T], dim=2).contiguous()  # [K/G, N, 2]

    def make():
        w, s = packed.clone(), pairs.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, GROUP, s)

    return Prepared(meaning, nbytes_of(packed, pairs), make)


def int8(weight: Tensor, threads: int) -> Prepared:
    """aten::_weight_int8pack_mm: one bf16 scale per row of the weight."""
    codes, scales = groupwise(weight, weight.shape[1], 127)
    scales = scales.bfloat16().view(-1)

    def make():
        w, s = codes.clone(), scales.clone()
        return lambda x: torch.ops.aten._weight_int8pack_mm(x, w, s)

    return Prepared(codes.float() * scales.float()[:, None], nbytes_of(codes, scales), make)


CONTESTANTS = (
    Contestant("torch F.linear bf16", "torch", "bf16", "bf16", torch.bfloat16, lambda w, _: linear(torch.bfloat16, w)),
    Contestant("torch F.linear fp32", "torch", "fp32", "fp32", torch.float32, lambda w, _: linear(torch.float32, w)),
    Contestant("aten int4pack", "torch", "int4 g128", "bf16", torch.bfloat16, int4),
    Contestant("aten int8pack", "torch", "int8", "bf16", torch.bfloat16, int8),
)
