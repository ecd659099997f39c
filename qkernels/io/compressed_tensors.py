"""compressed-tensors, the layout of llm-compressor: integers of 1 to 8 bits, FP8, and the microscaled formats.

A module's tensors, by format (G groups along K; scales are [1] for the tensor, [N, 1] by channel, [N, G] by group, or of blocks):

    pack-quantized          weight_packed [N, words] int32 of code + 2^(bits - 1), see compressed_words; weight_shape [2] int64;
                            weight_zero_point [words of N, G] int32, packed down the rows (of the whole tensor: int8, as it is);
                            weight_g_idx [K] int32, the group of each column
    int-quantized           weight [N, K] int8; weight_zero_point like the scales, int8
    float-quantized         weight [N, K] float8_e4m3fn
    naive-quantized         either of the two
    mxfp4-, mxfp6-pack-quantized, mxfp8-quantized   weight_packed [N, K * bits / 8] uint8 or weight float8_e4m3fn; scales uint8: e8m0
    nvfp4-pack-quantized    weight_packed [N, K / 2] uint8; weight_scale float8_e4m3fn; weight_global_scale [1] float32

W = (code - zero) * scale. The global scale of NVFP4 divides: the canonical tensor_scale is its reciprocal, so that values are within two
ulp of fp32 of the quotient; the original is kept in `origin`. Experts in one tensor [E, N, ...] become a QuantStack. Scales and zero
points of activations and caches (modules.ACTIVATION_LEAVES) change no weight, and come as plain tensors.
Source: compressed-tensors 0.17.1 and 0.20.0, whose own values are tests/golden/compressed_tensors.safetensors.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.formats import Int, QuantStack, QuantTensor
from qkernels.formats.packing import pack, unpack
from qkernels.io import compressed_words as words
from qkernels.io import groups
from qkernels.io.compressed_config import Config, Scheme
from qkernels.io.compressed_writer import LAYOUT, write
from qkernels.io.floats import exponents
from qkernels.io.modules import Module, assemble, walk

__all__ = ["read", "write"]
MARKS = ("weight_packed", "weight_scale")
LEAVES = ("weight", "weight_packed", "weight_scale", "weight_shape", "weight_zero_point", "weight_g_idx", "weight_global_scale")
_SCALES = (torch.float32, torch.float16, torch.bfloat16)
_E8M0 = (torch.uint8, torch.float8_e8m0fnu)
Value = QuantTensor | QuantStack | Tensor


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yield ("<module>.weight", QuantTensor or QuantStack) for each quantised module, and every other tensor as stored.

    A target that is a module's very name makes it an error that it is not quantised; classes and expressions may mean others too.
    """
    config, count = Config(settings), 0
    for name, found in walk(tensors, MARKS, LEAVES):
        if isinstance(found, Tensor):
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and config.named(module):
                raise CheckpointError(f"{name} is {found.dtype} and has no weight_scale, and config_groups names it as quantised")
            yield name, found
            continue
        count += 1
        yield name, _read(found, config.scheme(found.name), config.version)
    if not count:
        raise CheckpointError(f"the settings say compressed-tensors, and no module has {' or '.join(MARKS)}")


def _read(module: Module, scheme: Scheme, version: str | None) -> QuantTensor | QuantStack:
    held = {leaf: module.take(leaf, *_dtypes(leaf, scheme)) for leaf in (scheme.stored, *scheme.needed)}
    g_idx = module.find("weight_g_idx", *_dtypes("weight_g_idx", scheme))
    held |= {} if g_idx is None else {"weight_g_idx": g_idx}
    module.done()
    stored = held[scheme.stored]
    if stored.dim() != 3:
        return _weight(module, scheme, version, held)
    experts = stored.shape[0]
    if not experts:
        raise CheckpointError(f"{module.full(scheme.stored)} is {list(stored.shape)}, a stack of no weights")
    stated = held.get("weight_shape")
    if stated is not None:
        if stated.shape != (3,) or stated[0] != experts:
            shape = stated.flatten()[:4].tolist()
            raise CheckpointError(f"{module.full('weight_shape')} is {shape}, and weight_packed {list(stored.shape)}")
        held["weight_shape"] = stated[1:].expand(experts, -1)
    if any(t.dim() < 1 or t.shape[0] != experts for t in held.values()):
        shapes = {leaf: list(t.shape) for leaf, t in held.items()}
        raise CheckpointError(f"{module.name} is a stack of {experts} weights; its tensors are {shapes}")
    return QuantStack.of([_weight(module, scheme, version, {leaf: t[e] for leaf, t in held.items()}) for e in range(experts)])


def _dtypes(leaf: str, scheme: Scheme) -> tuple[torch.dtype, ...]:
    """What a tensor may be."""
    if leaf == "weight_packed":
        return (torch.int32,) if scheme.format == "pack-quantized" else (torch.uint8,)
    if leaf == "weight":
        return (torch.int8,) if isinstance(scheme.code, Int) else (torch.float8_e4m3fn,)
    if leaf == "weight_scale":
        return _E8M0 if scheme.format.startswith("mx") else (torch.float8_e4m3fn,) if scheme.format.startswith("nv") else _SCALES
    if leaf == "weight_zero_point":
        return (torch.int32,) if scheme.packs_zeros else (torch.int8,)
    return {"weight_shape": (torch.int64, torch.int32), "weight_g_idx": (torch.int32, torch.int64)}.get(leaf, (torch.float32,))


def _weight(module: Module, scheme: Scheme, version: str | None, held: Mapping[str, Tensor]) -> QuantTensor:
    if held[scheme.stored].dim() != 2:
        found = list(held[scheme.stored].shape)
        raise CheckpointError(f"{module.full(scheme.stored)} is {found}; two dimensions, or three of a stack, are read")
    origin: dict[str, Any] = {leaf: t for leaf, t in held.items() if leaf in ("weight_g_idx", "weight_global_scale")}
    origin["layout"] = LAYOUT
    scales, zeros = held["weight_scale"], held.get("weight_zero_point")
    origin |= {"scale_shape": tuple(scales.shape), "scale_dtype": scales.dtype, "zero_shape": None if zeros is None else tuple(zeros.shape)}
    if scheme.format == "pack-quantized":
        shape, codes, zeros, padded = _from_words(module, scheme, version, held)
        origin |= {"padded": padded, "shape_dtype": held["weight_shape"].dtype}
    else:
        shape, codes = _from_bytes(module, scheme, held[scheme.stored])
    if zeros is not None and not scheme.packs_zeros:
        zeros = _unsigned(module.full("weight_zero_point"), zeros, scheme.code.bits)
    if scheme.format.startswith("mx"):
        scales = exponents(scales)
    more = {"tensor_scale": _reciprocal(module, held["weight_global_scale"])} if "weight_global_scale" in held else {}
    q = assemble(module.full("weight"), scheme.code, shape, scheme.group, codes, scales, zeros, origin=origin, **more)
    if "weight_g_idx" in held:
        return _indexed(module, q, held["weight_g_idx"])
    if scheme.indexed:
        raise CheckpointError(f"{module.full('weight_g_idx')} is missing, and actorder says that it names the groups")
    return q


def _from_words(
    module: Module, scheme: Scheme, version: str | None, held: Mapping[str, Tensor]
) -> tuple[tuple[int, int], Tensor, Tensor | None, bool]:
    """(shape, codes, zero points, whether the words were padded); zero points come as they are where they are not packed."""
    packed, zeros, bits = held["weight_packed"], held.get("weight_zero_point"), scheme.code.bits
    n, k = _shape(module, held["weight_shape"], packed)
    rows = [(k, packed.shape[1])]
    if zeros is not None and scheme.packs_zeros:
        if zeros.dim() != 2:
            raise CheckpointError(f"{module.full('weight_zero_point')} is {list(zeros.shape)}; it has two dimensions")
        rows.append((n, zeros.shape[0]))
    padded = words.is_padded(module.name, bits, version, *rows)
    codes = words.from_words(module.full("weight_packed"), packed, bits, k, padded)
    if zeros is not None and scheme.packs_zeros:
        streams = words.from_words(module.full("weight_zero_point"), zeros.t(), bits, n, padded)
        zeros = unpack(streams, bits, n).t().contiguous()
    return (n, k), codes, zeros, padded


def _from_bytes(module: Module, scheme: Scheme, stored: Tensor) -> tuple[tuple[int, int], Tensor]:
    """(shape, codes)"""
    bits = scheme.code.bits
    if isinstance(scheme.code, Int):
        return (stored.shape[0], stored.shape[1]), pack(_unsigned(module.full("weight"), stored, bits), bits)
    return (stored.shape[0], stored.shape[1] * 8 // bits), stored.view(torch.uint8)


def _shape(module: Module, stated: Tensor, packed: Tensor) -> tuple[int, int]:
    shape = stated.flatten()[:4].tolist()
    if stated.shape != (2,) or shape[0] != packed.shape[0] or shape[1] < 1:
        raise CheckpointError(f"{module.full('weight_shape')} is {shape}, and weight_packed {list(packed.shape)}")
    return shape[0], shape[1]


def _unsigned(name: str, signed: Tensor, bits: int) -> Tensor:
    """int8 numbers of `bits` bits as codes."""
    codes = signed.to(torch.int16) + 2 ** (bits - 1)
    if codes.numel() and not 0 <= int(codes.min()) <= int(codes.max()) < 2**bits:
        raise CheckpointError(f"{name} has numbers from {int(signed.min())} to {int(signed.max())}, and num_bits is {bits}")
    return codes.to(torch.uint8)


def _reciprocal(module: Module, scale: Tensor) -> Tensor:
    inverse = 1 / scale.reshape(-1)
    if scale.numel() != 1 or not bool(torch.isfinite(inverse).all() and (inverse != 0).all()):
        found = f"{scale.flatten()[:4].tolist()} {list(scale.shape)}"
        raise CheckpointError(f"{module.full('weight_global_scale')} is {found}; one number that can be divided by is needed")
    return inverse


def _indexed(module: Module, q: QuantTensor, g_idx: Tensor) -> QuantTensor:
    """The same weight, its columns in the order of their groups; an index that is -1 throughout names none."""
    if g_idx.shape != q.shape[1:]:
        raise CheckpointError(f"{module.full('weight_g_idx')} is {list(g_idx.shape)}; the weight has {q.shape[1]} columns")
    if bool((g_idx == -1).all()):
        return q
    assert q.scales is not None
    if q.format.group[0] != 1:
        raise CheckpointError(f"{module.full('weight_g_idx')} is there, and the scales are of {q.format.name}: no groups along K")
    perm, group, order = groups.of_index(g_idx, q.format.group_extent(*q.shape)[1], q.scales.shape[1])
    scales, zeros = q.scales[:, order], None if q.zeros is None else q.zeros[:, order]
    spare = {} if len(order.unique()) == q.scales.shape[1] else {"scales": q.scales, "zeros": q.zeros}  # of groups without a column
    codes = q.codes if perm is None else pack(unpack(q.codes, q.format.bits, q.shape[1])[:, perm.long()], q.format.bits)
    origin = {**q.origin, **spare}
    return assemble(module.full("weight"), q.format.code, q.shape, (1, group), codes, scales, zeros, perm=perm, origin=origin)
