"""torch itself: cuBLAS in bf16 in several ways, of which the fastest counts, and aten's int4 kernel.

That kernel ("tinygemm") is also what torchao's int4 weights run on; its other int4 layouts need packages beside torchao.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ...base import Contestant, Layer, Prepared, expand, groupwise, nbytes_of

GROUP = 128
INNER_K_TILES = 8  # of 16 weights each, which one thread loads together: the widest
ROWS = 32  # from here on cuBLAS picks tensor-core tiles that keep up with the memory


def bf16(layer_of: Callable[[Tensor], Layer]) -> Callable[[Tensor, int], Prepared]:
    """A contestant's `prepare` from what makes a layer of one copy of the weight, bf16 [N, K]."""

    def prepare(weight: Tensor, threads: int) -> Prepared:
        cast = weight.bfloat16()
        return Prepared(cast.float(), cast.nbytes, lambda: layer_of(cast.clone()))

    return prepare


def linear(w: Tensor) -> Layer:
    """F.linear as everybody calls it."""
    return lambda x: F.linear(x, w)


def biased(w: Tensor) -> Layer:
    """F.linear with a bias of zeros: torch then goes through cuBLASLt, which chooses among other kernels."""
    bias = w.new_zeros(len(w))
    return lambda x: F.linear(x, w, bias)


def padded(weight: Tensor, threads: int) -> Prepared:
    """F.linear on x filled up with zeros to 32 rows.

    The copies of the layer share one filled-up x, written when they meet a new x: a model that does this would keep its activations in
    such a buffer, so the copying is no part of the product. An x must not change in place between calls.
    """
    cast = weight.bfloat16()
    seen: list[tuple[Tensor, Tensor]] = []  # the last x, held so that no other can take its place in memory, and its filled-up form

    def fill(x: Tensor) -> Tensor:
        if not seen or seen[0][0] is not x:
            if len(x) >= ROWS:
                raise ValueError(f"M = {len(x)} is not under {ROWS}")
            seen[:] = [(x, F.pad(x, (0, 0, 0, ROWS - len(x))))]
        return seen[0][1]

    def make() -> Layer:
        w = cast.clone()
        return lambda x: F.linear(fill(x), w)[: len(x)]

    return Prepared(cast.float(), cast.nbytes, make)


def vector(w: Tensor) -> Layer:
    """torch.mv, for one row."""

    def layer(x: Tensor) -> Tensor:
        if len(x) != 1:
            raise ValueError(f"M = {len(x)} is not 1")
        return torch.mv(w, x[0])[None]

    return layer


def int4(weight: Tensor, threads: int) -> Prepared:
    """aten::_weight_int4pack_mm: value = (code - 8) * scale + zero, with bf16 scales per group of 128, here with zeros of 0.

    It packs bytes [N, K/2] with the even k in the high nibble; N must be a multiple of 8, K of 128.
    """
    codes, scales = groupwise(weight, GROUP, 7)
    scales = scales.bfloat16()
    unsigned = (codes + 8).to(torch.uint8)
    packed = torch.ops.aten._convert_weight_to_int4pack((unsigned[:, 0::2] << 4 | unsigned[:, 1::2]).contiguous(), INNER_K_TILES)
    pairs = torch.stack([scales.T, torch.zeros_like(scales.T)], dim=2).contiguous()  # [K/G, N, 2]

    def make() -> Layer:
        w, s = packed.clone(), pairs.clone()
        return lambda x: torch.ops.aten._weight_int4pack_mm(x, w, GROUP, s)

    return Prepared(expand(codes, scales), nbytes_of(packed, pairs), make)


CONTESTANTS = (
    Contestant("torch F.linear bf16", "torch", "bf16", "bf16", torch.bfloat16, bf16(linear)),
    Contestant("torch F.linear bf16, bias", "torch", "bf16", "bf16", torch.bfloat16, bf16(biased)),
    Contestant("torch F.linear bf16, 32 rows", "torch", "bf16", "bf16", torch.bfloat16, padded),
    Contestant("torch mv bf16", "torch", "bf16", "bf16", torch.bfloat16, bf16(vector)),
)
PEERS = (Contestant("aten int4pack (torchao)", "peer", "int4 g128", "bf16", torch.bfloat16, int4),)
