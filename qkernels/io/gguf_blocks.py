"""Weights from elsewhere as ggml's blocks: those that one of its types holds exactly, number by number."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from qkernels.errors import UnsupportedError
from qkernels.formats import Parts, QuantStack, QuantTensor
from qkernels.formats.ggml import TYPES
from qkernels.formats.packing import unpack
from qkernels.io.weights import Value

# what of a format a type with one level of scales holds -> its id; longer groups are written as several
_HELD = {
    "u4b8_g32_sf16": 2,
    "u4_g32_zm_sf16": 3,
    "u5b16_g32_sf16": 6,
    "u5_g32_zm_sf16": 7,
    "u8b128_g32_sf16": 8,
    "e2m1_g32_se8m0": 39,
    "e2m1_g16_se4m3": 40,
}


def of(name: str, value: QuantTensor | QuantStack) -> QuantTensor | QuantStack:
    """Say the same in blocks: int4, int5 and int8 with fp16 scales and MXFP4 and NVFP4 (see `apart`) become ggml's types.

    Raises UnsupportedError naming the weight and what of it ggml has no type for.
    """
    if value.format.block is not None:
        return value
    if isinstance(value, QuantStack):
        folded = QuantTensor.from_tensors(
            value.format, (value.shape[0] * value.shape[1], value.shape[2]), {field: t.flatten(0, 1) for field, t in value.tensors.items()}
        )
        blocks = _blocks(name, folded)
        return QuantStack(blocks.format, value.shape, {"codes": blocks.codes.view(*value.shape[:2], -1)})
    return _blocks(name, value)


def apart(name: str, value: Value) -> list[tuple[str, Value]]:
    """The tensors that a file has of a weight: itself, and "<name>.scale" for NVFP4's scale of the whole tensor.

    llama.cpp multiplies what the weight makes by that: of a stack by one number for each expert, of token_embd it does not.
    """
    if isinstance(value, Tensor) or not value.format.tensor_scale or not name.endswith(".weight") or name == "token_embd.weight":
        return [(name, value)]
    tensors = dict(value.tensors if isinstance(value, QuantStack) else value.tensors())
    scale, format = tensors.pop("tensor_scale").flatten(), replace(value.format, tensor_scale=False, name="")
    stack = isinstance(value, QuantStack)
    rest = QuantStack(format, value.shape, tensors) if stack else QuantTensor.from_tensors(format, value.shape, tensors)  # type: ignore[arg-type]
    return [(name, rest), (f"{name.removesuffix('weight')}scale", scale)]


def _blocks(name: str, q: QuantTensor) -> QuantTensor:
    (n, k), given = q.shape, q.format
    id = next((id for held, id in _HELD.items() if replace(given, group=TYPES[id].group, name="").name == held), None)
    if id is None or given.group[0] != 1:
        raise UnsupportedError(f"{name} is {given.name}, which no type of ggml holds; {', '.join(_HELD)} are held, and longer groups")
    format, block = TYPES[id], TYPES[id].block
    assert block is not None and block.join is not None and q.scales is not None
    group, size = given.group_extent(n, k)[1], format.group[1]
    if k % block.elements or group % size or k % group:
        blocks = f"{format.name} has groups of {size} in blocks of {block.elements}"
        raise UnsupportedError(f"{name} has K = {k} in groups of {group}; {blocks}, and both must be multiples")
    if given.scale == "e4m3" and bool((q.scales.view(torch.uint8) >= 0x7F).any()):
        raise UnsupportedError(f"{name} has scales that are negative or NaN, which {format.name} has no bits for")

    def spread(per_group: Tensor) -> Tensor:
        return per_group.repeat_interleave(group // size, 1).view(n, k // block.elements, -1)

    codes = unpack(q.codes, given.bits, k).view(n, -1, block.elements)
    raw = block.join(Parts(codes, spread(q.scales), m=None if q.zeros is None else spread(q.zeros)))
    return QuantTensor(format, q.shape, raw.view(n, -1))
