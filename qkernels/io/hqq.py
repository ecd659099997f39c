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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.format import scale_type
from qkernels.formats.packing import pack, unpack
from qkernels.io import checked
from qkernels.io.groups import of_flat_blocks
from qkernels.io.settings import Settings

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
    done: set[str] = set()
    dense = []
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if f"{module}.W_q" not in tensors or leaf == "bias":
            if leaf == "W_q":
                raise CheckpointError(f"{name} has no module before its name")
            yield name, tensors[name]
        elif leaf not in (*_TENSORS, *_FLAGS, *_IGNORED, *_NESTED):
            raise CheckpointError(f"{name} beside {module}.W_q is unknown: it may change what the numbers mean")
        elif module not in done:
            done.add(module)
            value = _read_layer(module, tensors)
            dense += [module] if isinstance(value, Tensor) else []
            yield f"{module}.weight", value
    if dense:
        log.warning("%d HQQ weights have strided groups (axis 0), which no kernel takes; they are dense now: %s …", len(dense), dense[0])


def _check_settings(values: Mapping[str, Any]) -> None:
    settings = Settings(values, "quantization_config")
    settings.take("quant_method", of=str, default="hqq", choices=("hqq",))
    settings.ignore("quant_config", "skip_modules")  # each layer says it of itself
    settings.done()


def _read_layer(module: str, tensors: Mapping[str, Tensor]) -> QuantTensor | Tensor:
    layer = _layer(module, tensors)
    codes = _codes(f"{module}.W_q", tensors, layer)
    rows, columns = layer.matrix
    shape = (1,) if layer.one else (rows, 1) if layer.axis == 1 else (1, columns)
    scale, zero = (_numbers(tensors, f"{module}.{name}", shape) for name in ("scale", "zero"))
    if scale.dtype != zero.dtype:
        raise UnsupportedError(f"{module}.scale is {scale.dtype}, its zero {zero.dtype}; they have one type in what is read")
    n, k = layer.n, layer.k
    if layer.one:
        group, scales, zeros = (-1, -1), scale.view(1, 1), zero.view(1, 1)
    elif layer.axis == 1:
        (scales, along), (zeros, _) = (of_flat_blocks(numbers, n, k, columns) for numbers in (scale, zero))
        group = (1, along if along < k else -1)
    elif columns == k:
        group, scales, zeros = (-1, 1), scale, zero
    else:
        return ((codes.to(layer.compute) - zero) * scale).view(n, k)
    format = QuantFormat(Int(layer.bits), group, scale_type(scale.dtype), "float")
    return QuantTensor(format, (n, k), pack(codes.reshape(n, k), layer.bits), scales.contiguous(), zeros.contiguous())


def _layer(module: str, tensors: Mapping[str, Tensor]) -> _Layer:
    flags = {flag: _number(tensors, f"{module}.{flag}", int(flag == "channel_wise")) for flag in _FLAGS}
    nested = [name for name in _NESTED if f"{module}.{name}" in tensors] + [flag for flag in _FLAGS[1:3] if flags[flag]]
    if nested:
        raise UnsupportedError(f"{module}.{nested[0]}: scales or zero points that are quantised themselves are not read; float ones are")
    n, k = checked.extents(checked.tensor(tensors, f"{module}.shape", (torch.int64,), (2,)).tolist(), 2, f"{module}.shape")
    nbits = _number(tensors, f"{module}.nbits")
    near = next((bits for bits in _BITS if abs(bits - nbits) < 1e-6), None)  # 1.58 is stored as float32
    packing = _text(tensors, f"{module}.packing")
    if near is None or packing != _BITS[near]:
        possible = ", ".join(f"{bits} in {name}" for bits, name in _BITS.items())
        raise CheckpointError(f"{module} has nbits {nbits:.6g} in packing {packing!r:.40}; {possible} are possible")
    axis = _number(tensors, f"{module}.axis")
    if axis not in (0, 1):
        raise CheckpointError(f"{module}.axis is {axis}; 0 or 1 is possible")
    one = not flags["channel_wise"]
    group = None if one or f"{module}.group_size" not in tensors else int(_number(tensors, f"{module}.group_size"))
    if group is not None and (group < 1 or n * k % group):
        raise CheckpointError(f"{module}.group_size is {group}, which does not divide {n} x {k}")
    name = _text(tensors, f"{module}.compute_dtype", "torch.float16")
    compute = next((dtype for dtype in _FLOATS if str(dtype) == name), None)
    if compute is None:
        raise CheckpointError(f"{module}.compute_dtype is {name!r:.40}; {', '.join(map(str, _FLOATS))} are possible")
    return _Layer(n, k, 2 if near == 1.58 else int(near), packing, int(axis), group, one, bool(flags["view_as_float"]), compute)


def _codes(name: str, tensors: Mapping[str, Tensor], layer: _Layer) -> Tensor:
    """[R, C] uint8"""
    word, bits, per_word = _PACKINGS[layer.packing]
    rows, columns = layer.matrix
    packed = checked.tensor(tensors, name, _FLOATS if layer.as_float else (word,), (-1, -1))
    stored = packed.contiguous().view(torch.uint8).unflatten(-1, (-1, word.itemsize)) if packed.numel() else packed
    parts = -(-rows // per_word)
    if tuple(stored.shape[:2]) != (parts, columns) or (layer.packing != "3bit_32" and rows % per_word):
        needed = f"{rows} x {columns} codes in {layer.packing} are [{rows / per_word:g}, {columns}]"
        raise CheckpointError(f"{name} is {list(packed.shape)} {packed.dtype}; {needed}")
    codes = unpack(stored, bits, per_word).flip(-1).movedim(-1, 0).reshape(-1, columns)[:rows]
    if (largest := int(codes.max())) >= 2**layer.bits:
        raise CheckpointError(f"{name} holds the code {largest}, beyond {layer.bits} bits")
    return codes


def _numbers(tensors: Mapping[str, Tensor], name: str, shape: tuple[int, ...]) -> Tensor:
    """Scales or zeros; those that are one in all may have any shape of one element."""
    found = checked.tensor(tensors, name, _FLOATS, None if shape == (1,) else shape)
    if shape == (1,) and found.numel() != 1:
        raise CheckpointError(f"{name} is {list(found.shape)}; channel_wise is 0, and one number is needed")
    return found


def _number(tensors: Mapping[str, Tensor], name: str, default: float | None = None) -> float:
    if name not in tensors and default is not None:
        return default
    found = checked.tensor(tensors, name, (torch.uint8, torch.int32, torch.int64, torch.float32))
    if found.numel() != 1 or not torch.isfinite(found).all():
        raise CheckpointError(f"{name} is {list(found.shape)} {found.flatten()[:3].tolist()}; one finite number is needed")
    return found.item()


def _text(tensors: Mapping[str, Tensor], name: str, default: str | None = None) -> str:
    if name not in tensors and default is not None:
        return default
    found = checked.tensor(tensors, name, (torch.uint8,), (-1,))
    if found.numel() > 64:
        raise CheckpointError(f"{name} has {found.numel()} characters; 64 at most are read")
    return bytes(found.tolist()).decode("latin-1")
