"""Weights of small floats, FP8 and FP4, as the readers of several layouts build them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Float, QuantStack, QuantTensor
from qkernels.io.modules import assemble, of_dtype

E2M1, MX_GROUP, NV_GROUP = Float(2, 1), 32, 16
SCALES = (torch.float32, torch.float16, torch.bfloat16, torch.float8_e8m0fnu)
_FP8 = {torch.float8_e4m3fn: Float(4, 3), torch.float8_e5m2: Float(5, 2)}


def is_fp8(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and tensor.dtype.itemsize == 1 and tensor.dtype != torch.float8_e8m0fnu


def fp8(name: str, weight: Tensor, scale_name: str, scales: Tensor, block: Sequence[int] | None) -> QuantTensor | QuantStack:
    """An FP8 weight, whose scales multiply it; a stack of experts where it has three dimensions.

    The scales are those of the whole tensor, of its rows, or of blocks, whose size is stated and never concluded from the shapes: a
    last block may be cut off. Scales that are uint8 are exponents (e8m0), one for `block`, or for 32 along K where none is stated (MXFP8).

    Shapes:
        weight   [N, K] or [E, N, K]    float8_e4m3fn or float8_e5m2
        scales   of each weight: [] [1] [N] [N, 1] or [N / block_n, K / block_k] rounded up
    """
    if weight.dtype not in _FP8:
        raise UnsupportedError(f"{name} is {weight.dtype}, which is not read; {' and '.join(map(str, _FP8))} are")
    if weight.dim() not in (2, 3) or 0 in weight.shape:
        raise CheckpointError(f"{name} is {list(weight.shape)}; a weight has two dimensions, a stack of them three, none of them 0")
    scales = exponents(of_dtype(scale_name, scales, *SCALES, torch.uint8))
    if weight.dim() == 3:
        each_scale = scales.reshape(1).expand(len(weight)) if scales.numel() == 1 else scales
        if len(each_scale) != len(weight):
            raise CheckpointError(f"{scale_name} is {list(scales.shape)}, and {name} a stack {list(weight.shape)}")
        return QuantStack.of([fp8(f"{name}[{e}]", w, scale_name, s, block) for e, (w, s) in enumerate(zip(weight, each_scale))])  # type: ignore[misc]
    group = _group(scale_name, weight, scales, block)
    return assemble(name, _FP8[weight.dtype], weight.shape, group, weight.view(torch.uint8), scales)


def _group(name: str, weight: Tensor, scales: Tensor, block: Sequence[int] | None) -> tuple[int, int]:
    n, k = weight.shape
    if block is None and scales.dtype == torch.float8_e8m0fnu and scales.dim() == 2:
        block = [1, MX_GROUP]
    blocks = None if block is None else [-(-n // block[0]), -(-k // block[1])]
    if block is not None and list(scales.shape) == blocks:
        return block[0], block[1]
    if scales.numel() == 1:
        return -1, -1
    if [extent for extent in scales.shape if extent != 1] == [n]:
        return 1, -1
    stated = "no block size is stated" if block is None else f"blocks of {list(block)} have {blocks}"
    raise CheckpointError(
        f"{name} is {list(scales.shape)}, its weight {list(weight.shape)}: it is neither one nor one for a row, and {stated}"
    )


def fp4(name: str, packed: Tensor, scales: Tensor, group: int, **more: Any) -> QuantTensor:
    """FP4 codes, the even column in the low nibble, and scales along K.

    Shapes:
        packed   [N, K / 2]        any type of one byte
        scales   [N, K / group]    float8_e8m0fnu or float8_e4m3fn
    """
    if packed.dim() != 2:
        raise CheckpointError(f"{name} is {list(packed.shape)}; packed weights have two dimensions")
    octets = packed.view(torch.uint8)
    return assemble(name, E2M1, (octets.shape[0], 2 * octets.shape[1]), (1, group), octets, scales, **more)


def exponents(scales: Tensor) -> Tensor:
    """Bytes as the powers of two that they are: 2^(byte - 127); other scales as they are."""
    return scales.view(torch.float8_e8m0fnu) if scales.dtype == torch.uint8 else scales
