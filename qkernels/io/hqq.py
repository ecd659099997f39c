"""HQQ: integer codes with float scales and zero points, in groups of the flattened weight, each fact of a layer a tensor of its own.

The weight [N, K] lies as a matrix [R, C], one group per row (axis 1: C = group_size) or one per column (axis 0: R = group_size, so that
a group's elements lie K * N / group_size apart). Packed are its rows: with P codes a byte (or int32 word), row r of the first of P equal
parts is in the highest bits, that of the last in the lowest.

    X.W_q                         [R / P, C]         uint8 or int32, or these bytes seen as a float type
    X.scale, X.zero               [R, 1] or [1, C]   float; W = (code - zero) * scale, in compute_dtype
    X.shape                       [2]                int64
    X.nbits, group_size, axis     one number each; no group_size: whole rows or columns
    X.packing, compute_dtype …    uint8, ASCII; flags are one uint8 each

Source: what hqq 0.2.8 saves where it encodes for safetensors. Its older qmodel.pt is a pickle, which is never loaded.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantTensor
from qkernels.formats.packing import pack, unpack
from qkernels.io import checked
from qkernels.io.groups import of_flat_blocks
from qkernels.io.modules import Module, walk
from qkernels.io.settings import Settings
from qkernels.io.weights import assemble
from qkernels.io.words import octets

log = logging.getLogger("qkernels")

# packing -> (the word that codes are packed in, bits of a code there, codes a word); nbits -> packing, bits of a code
_PACKINGS = {
    "8bit_u8": (torch.uint8, 8, 1),
    "4bit_u8": (torch.uint8, 4, 2),
    "3bit_32": (torch.int32, 3, 10),
    "2bit_u8": (torch.uint8, 2, 4),
    "1bit_u8": (torch.uint8, 1, 8),
}
_BITS = {8: "8bit_u8", 6: "8bit_u8", 5: "8bit_u8", 4: "4bit_u8", 3: "3bit_32", 2: "2bit_u8", 1.58: "2bit_u8", 1: "1bit_u8"}
_FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_TENSORS = ("W_q", "scale", "zero", "shape", "nbits", "group_size", "axis", "packing", "unpack_view_dtype", "compute_dtype")
_NUMBERS = (torch.uint8, torch.int32, torch.int64, torch.float32)
_FLAGS = ("view_as_float", "quant_scale", "quant_zero", "channel_wise")
_IGNORED = ("offload_meta", "encoded_state_dict", "stores_quant_config", "optimize", "round_zero")  # how it was made and is kept
_NESTED = ("scale_q", "zero_q", "meta_scale", "meta_zero")


class _Layer(NamedTuple):
    """What the tensors of a layer say; `group` is None for whole rows or columns, `one` for one scale in all."""

    n: int
    k: int
    bits: int
    packing: str
    axis: int
    group: int | None
    one: bool
    as_float: bool
    compute: torch.dtype

    @property
    def matrix(self) -> tuple[int, int]:
        """[R, C]"""
        if self.group is None:
            return self.n, self.k
        other = self.n * self.k // self.group
        return (other, self.group) if self.axis == 1 else (self.group, other)


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Go through a checkpoint: weights as QuantTensor, everything else as it is; see `qkernels.io`.

    Groups along axis 0 run through the rows in steps; canonical scales cannot say so, and such weights are given dense, as hqq decodes
    them. Decoded in hqq's compute_dtype, which its scales have too, the values are hqq's to the last bit.
    """
    _check_settings(settings)
    dense = []
    for name, found in walk(tensors, ("W_q",), (*_TENSORS, *_FLAGS, *_IGNORED, *_NESTED), beside=("bias",)):
        value = _read_layer(found) if isinstance(found, Module) else found
        dense += [found.name] if isinstance(found, Module) and isinstance(value, Tensor) else []
        yield name, value
    if dense:
        log.warning("%d HQQ weights have strided groups (axis 0), which no kernel takes; they are dense now: %s …", len(dense), dense[0])


def _check_settings(values: Mapping[str, Any]) -> None:
    settings = Settings(values, "quantization_config")
    settings.take("quant_method", of=str, default="hqq", choices=("hqq",))
    settings.ignore("quant_config", "skip_modules")  # each layer says it of itself
    settings.done()


def _read_layer(module: Module) -> QuantTensor | Tensor:
    layer = _layer(module)
    codes = _codes(module, layer)
    rows, columns = layer.matrix
    shape = (rows, 1) if layer.axis == 1 else (1, columns)
    take = partial(module.numbers, shape=(1, 1)) if layer.one else partial(module.take, shape=shape)
    scale, zero = (take(leaf, *_FLOATS) for leaf in ("scale", "zero"))
    if scale.dtype != zero.dtype:
        raise UnsupportedError(f"{module.full('scale')} is {scale.dtype}, its zero {zero.dtype}; they have one type in what is read")
    n, k = layer.n, layer.k
    if layer.one:
        group, scales, zeros = (-1, -1), scale, zero
    elif layer.axis == 1:
        (scales, along), (zeros, _) = (of_flat_blocks(numbers, n, k, columns) for numbers in (scale, zero))
        group = (1, along if along < k else -1)
    elif columns == k:
        group, scales, zeros = (-1, 1), scale, zero
    else:
        return ((codes.to(layer.compute) - zero) * scale).view(n, k)
    return assemble(module.full("weight"), Int(layer.bits), (n, k), group, pack(codes.reshape(n, k), layer.bits), scales, zeros, "float")


def _layer(module: Module) -> _Layer:
    flags = {flag: _number(module, flag, int(flag == "channel_wise")) for flag in _FLAGS}
    nested = [leaf for leaf in _NESTED if leaf in module] + [flag for flag in _FLAGS[1:3] if flags[flag]]
    if nested:
        raise UnsupportedError(f"{module.full(nested[0])}: scales or zero points that are quantised themselves are not read")
    n, k = checked.extents(module.take("shape", torch.int64, shape=(2,)).tolist(), 2, module.full("shape"))
    nbits = _number(module, "nbits")
    near = next((bits for bits in _BITS if abs(bits - nbits) < 1e-6), None)  # 1.58 is stored as float32
    packing = _text(module, "packing")
    if near is None or packing != _BITS[near]:
        possible = ", ".join(f"{bits} in {name}" for bits, name in _BITS.items())
        raise CheckpointError(f"{module.name} has nbits {nbits:.6g} in packing {packing!r:.40}; {possible} are possible")
    axis = _number(module, "axis")
    if axis not in (0, 1):
        raise CheckpointError(f"{module.full('axis')} is {axis}; 0 or 1 is possible")
    one = not flags["channel_wise"]
    group = None if one or "group_size" not in module else int(_number(module, "group_size"))
    if group is not None and (group < 1 or n * k % group):
        raise CheckpointError(f"{module.full('group_size')} is {group}, which does not divide {n} x {k}")
    name = _text(module, "compute_dtype", "torch.float16")
    compute = next((dtype for dtype in _FLOATS if str(dtype) == name), None)
    if compute is None:
        raise CheckpointError(f"{module.full('compute_dtype')} is {name!r:.40}; {', '.join(map(str, _FLOATS))} are possible")
    return _Layer(n, k, 2 if near == 1.58 else int(near), packing, int(axis), group, one, bool(flags["view_as_float"]), compute)


def _codes(module: Module, layer: _Layer) -> Tensor:
    """[R, C] uint8"""
    word, bits, per_word = _PACKINGS[layer.packing]
    rows, columns = layer.matrix
    name, packed = module.full("W_q"), module.take("W_q", *(_FLOATS if layer.as_float else (word,)), shape=(-1, -1))
    stored = octets(packed).unflatten(-1, (-1, word.itemsize))
    parts = -(-rows // per_word)
    if tuple(stored.shape[:2]) != (parts, columns) or (layer.packing != "3bit_32" and rows % per_word):
        needed = f"{rows} x {columns} codes in {layer.packing} are [{rows / per_word:g}, {columns}]"
        raise CheckpointError(f"{name} is {list(packed.shape)} {packed.dtype}; {needed}")
    codes = unpack(stored, bits, per_word).flip(-1).movedim(-1, 0).reshape(-1, columns)[:rows]
    if (largest := int(codes.max())) >= 2**layer.bits:
        raise CheckpointError(f"{name} holds the code {largest}, beyond {layer.bits} bits")
    return codes


def _number(module: Module, leaf: str, default: float | None = None) -> float:
    if leaf not in module and default is not None:
        return default
    found = module.take(leaf, *_NUMBERS)
    if found.numel() != 1 or not torch.isfinite(found).all():
        raise CheckpointError(f"{module.full(leaf)} is {list(found.shape)} {found.flatten()[:3].tolist()}; one finite number is needed")
    return found.item()


def _text(module: Module, leaf: str, default: str | None = None) -> str:
    if leaf not in module and default is not None:
        return default
    return checked.text(module.full(leaf), module.take(leaf, torch.uint8), 64).decode("latin-1")
