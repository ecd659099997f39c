"""Canonical weights as a compressed-tensors checkpoint: what `compressed_tensors.read` gives, byte for byte, and weights of elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import UnsupportedError
from qkernels.formats import Float, Int, QuantStack, QuantTensor
from qkernels.formats.packing import pack, unpack
from qkernels.io import compressed_words as words
from qkernels.io import groups
from qkernels.io.compressed_config import Config, Scheme

LAYOUT = "compressed_tensors"  # whose reader's `origin` is used; that of another layout says nothing here
VERSION = "0.18.0"  # whose words are written where no settings ask for others
Value = QuantTensor | QuantStack | Tensor


def write(items: Iterable[tuple[str, Value]], settings: Mapping[str, Any] | None, add: Callable[[str, Tensor], None]) -> Mapping[str, Any]:
    """Add the tensors of every weight, and return the settings; made anew, they name each module as a target.

    Without settings integers become pack-quantized, floats what their group and scales are: float-, mxfp8-, mxfp4-, mxfp6- or
    nvfp4-quantized. A permutation becomes a weight_g_idx ("actorder": "group", which releases to 0.18 and vLLM read).
    A QuantStack has no `origin`: its scales are [E, 1], [E, N, 1] or [E, N, G], and its words those of the stated version.
    Raises UnsupportedError for numbers that the format cannot hold: other zero points, groups, scales.
    """
    config = None if settings is None else Config(settings)
    made: dict[Scheme, list[str]] = {}
    for name, value in items:
        if isinstance(value, Tensor):
            add(name, value)
            continue
        module, dot, leaf = name.rpartition(".")
        if leaf != "weight" or not dot:
            raise UnsupportedError(f"{name} is no weight of a module; compressed-tensors stores <module>.weight")
        weights = [value] if isinstance(value, QuantTensor) else [value[e] for e in range(len(value))]
        scheme = _scheme(name, weights[0]) if config is None else config.scheme(module)
        made.setdefault(scheme, []).append(module)
        each = [_tensors(name, q, scheme, VERSION if config is None else config.version, config is None) for q in weights]
        for leaf, t in (each[0] if isinstance(value, QuantTensor) else _stacked(each)).items():
            add(f"{module}.{leaf}", t)
    if settings is not None:
        return settings
    if not made:
        raise UnsupportedError("no weight is quantised; a compressed-tensors checkpoint has at least one")
    return _settings(made)


def _scheme(name: str, q: QuantTensor) -> Scheme:
    """The scheme of a weight from elsewhere."""
    f, code = q.format, q.format.code
    what = f"{name} is {f.name}"
    n, k = f.group
    if f.block is not None or not isinstance(code, (Int, Float)):
        raise UnsupportedError(f"{what}; compressed-tensors holds integers and small floats in groups")
    if ((n, k) != (-1, -1) and (n == -1 or (n > 1 and k == -1))) or (n == 1 and k > 0 and q.shape[1] % k):
        raise UnsupportedError(f"{what} with K = {q.shape[1]}; a scale is for all, a row, a group that divides K, or a block")
    if isinstance(code, Int):
        symmetric = f.zero == "none"
        if f.zero not in ("none", "int") or (symmetric and code.bias != 2 ** (code.bits - 1)):
            raise UnsupportedError(f"{what}; zero points are integers, or none and the bias is half the range")
        if f.scale not in ("f32", "f16", "bf16") or f.tensor_scale or ((n, k) != (-1, -1) and n != 1):
            raise UnsupportedError(f"{what}; packed integers have f32, f16 or bf16 scales for all, a row or a group")
        return Scheme("pack-quantized", code, symmetric, f.group, q.perm is not None)
    format = _float_format(q)
    if format is None or q.perm is not None:
        permuted = ", its columns permuted" if q.perm is not None else ""
        raise UnsupportedError(f"{what}{permuted}; e4m3 with f32, f16 or bf16 scales, MXFP4, MXFP6 (e2m3), MXFP8 and NVFP4 can be written")
    return Scheme(format, code, True, f.group)


def _float_format(q: QuantTensor) -> str | None:
    f = q.format
    if f.scale == "e8m0" and f.group == (1, 32) and not f.tensor_scale:
        return {"e2m1": "mxfp4-pack-quantized", "e2m3": "mxfp6-pack-quantized", "e4m3": "mxfp8-quantized"}.get(f.code.name)
    if f.scale == "e4m3" and f.group == (1, 16) and f.tensor_scale and f.code.name == "e2m1":
        return "nvfp4-pack-quantized"
    return "float-quantized" if f.code.name == "e4m3" and f.scale in ("f32", "f16", "bf16") and not f.tensor_scale else None


def _tensors(name: str, q: QuantTensor, scheme: Scheme, version: str | None, anew: bool) -> dict[str, Tensor]:
    """What is stored of a weight, by leaf."""
    bits, (n, k), origin = scheme.code.bits, q.shape, _origin(q)
    codes, scales, zeros, g_idx = _by_column(name, q, scheme)
    held = {} if g_idx is None else {"weight_g_idx": g_idx}
    padded = False
    if scheme.format == "pack-quantized":
        padded = False if anew else origin.get("padded", words.padded_by(version) or False)
        held["weight_packed"] = words.to_words(codes, bits, k, padded)
        held["weight_shape"] = torch.tensor(q.shape, dtype=origin.get("shape_dtype", torch.int64))
    elif isinstance(scheme.code, Int):
        held["weight"] = _signed(unpack(codes, bits, k), bits)
    else:
        held[scheme.stored] = codes.view(torch.float8_e4m3fn) if scheme.stored == "weight" else codes
    if zeros is not None and scheme.packs_zeros:
        held["weight_zero_point"] = words.to_words(pack(zeros.t(), bits), bits, n, padded).t().clone(memory_format=torch.contiguous_format)
    elif zeros is not None:
        held["weight_zero_point"] = _shaped(_signed(zeros, bits), origin.get("zero_shape"), scheme)
    if scheme.format == "pack-quantized":
        _check_words(name, held, q, scheme, version, padded)
    if scheme.format.startswith("mx"):
        scales = scales.view(origin.get("scale_dtype", torch.uint8))
    held["weight_scale"] = _shaped(scales, origin.get("scale_shape"), scheme)
    if q.tensor_scale is not None:
        held["weight_global_scale"] = _global_scale(name, q)
    return held


def _origin(q: QuantTensor) -> Mapping[str, Any]:
    return q.origin if q.origin.get("layout") == LAYOUT else {}


def _check_words(name: str, held: Mapping[str, Tensor], q: QuantTensor, scheme: Scheme, version: str | None, padded: bool) -> None:
    """Where two layouts of words have one width, the version must tell a reader what was written."""
    rows = [(q.shape[1], held["weight_packed"].shape[1])]
    if scheme.packs_zeros and "weight_zero_point" in held:
        rows.append((q.shape[0], held["weight_zero_point"].shape[0]))
    differ = words.differ(scheme.code.bits, *(count for count, _ in rows))
    if differ and words.is_padded(name, scheme.code.bits, version, *rows) != padded:
        raise UnsupportedError(f"{name} has words as version {version!r} does not write them: write it without settings")


def _by_column(name: str, q: QuantTensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """(codes, scales, zeros, g_idx) with the columns in the order of the weight, and groups as the checkpoint counts them."""
    f = q.format
    zero = "none" if scheme.symmetric else "int"
    if (f.code, f.zero, f.tensor_scale) != (scheme.code, zero, scheme.format.startswith("nvfp4")):
        raise UnsupportedError(f"{name} is {f.name}; the settings say {scheme.format} of {scheme.code.name} codes, zero points: {zero}")
    scales = ("e8m0",) if scheme.format.startswith("mx") else ("e4m3",) if scheme.format.startswith("nv") else ("f32", "f16", "bf16")
    if f.scale not in scales:
        raise UnsupportedError(f"{name} is {f.name}; the scales of {scheme.format} are {' or '.join(scales)}")
    assert q.scales is not None
    found = _as_read(q, scheme)
    if found is not None:
        return found
    if f.group != scheme.group or (q.perm is not None and not (scheme.indexed and f.group[0] == 1)):
        permuted = " with its columns permuted" if q.perm is not None else ""
        raise UnsupportedError(f"{name} is {f.name}{permuted}; the settings say groups of {scheme.group}; actorder 'group' permutes")
    if not scheme.indexed:
        return q.codes, q.scales, q.zeros, None
    g_idx = torch.arange(q.shape[1], dtype=torch.int32) // f.group_extent(*q.shape)[1]
    return _unpermuted(q), q.scales, q.zeros, g_idx if q.perm is None else torch.empty_like(g_idx).index_copy_(0, q.perm.long(), g_idx)


def _as_read(q: QuantTensor, scheme: Scheme) -> tuple[Tensor, Tensor, Tensor | None, Tensor] | None:
    """By the weight_g_idx that the weight was read with, if it still gives these columns and scales."""
    g_idx = _origin(q).get("weight_g_idx")
    if g_idx is None or g_idx.shape != q.shape[1:] or scheme.group[0] != 1 or q.scales is None:
        return None
    if bool((g_idx == -1).all()):
        return (q.codes, q.scales, q.zeros, g_idx) if q.format.group == scheme.group and q.perm is None else None
    extent = q.shape[1] if scheme.group[1] == -1 else min(scheme.group[1], q.shape[1])
    count = -(-q.shape[1] // extent)
    perm, group, order = groups.of_index(g_idx, extent, count)
    same = (perm is None) == (q.perm is None) and (perm is None or q.perm is None or torch.equal(perm, q.perm))
    spread: list[Tensor | None] = []
    for numbers, spare in ((q.scales, _origin(q).get("scales")), (q.zeros, _origin(q).get("zeros"))):
        full = None if numbers is None else (numbers.new_zeros(q.shape[0], count) if spare is None else spare.clone())
        if full is not None and numbers is not None:
            full[:, order] = numbers
            same = same and torch.equal(full[:, order].view(torch.uint8), numbers.contiguous().view(torch.uint8))
        spread.append(full)
    scales, zeros = spread
    return (_unpermuted(q), scales, zeros, g_idx) if same and q.format.group_extent(*q.shape)[1] == group and scales is not None else None


def _unpermuted(q: QuantTensor) -> Tensor:
    if q.perm is None:
        return q.codes
    codes = unpack(q.codes, q.format.bits, q.shape[1])
    return pack(torch.empty_like(codes).index_copy_(1, q.perm.long(), codes), q.format.bits)


def _signed(codes: Tensor, bits: int) -> Tensor:
    return (codes.to(torch.int16) - 2 ** (bits - 1)).to(torch.int8)


def _shaped(numbers: Tensor, shape: tuple[int, ...] | None, scheme: Scheme) -> Tensor:
    """As they were read, else [1] for the whole tensor and two dimensions for groups."""
    if shape is not None and torch.Size(shape).numel() == numbers.numel():
        return numbers.reshape(shape)
    return numbers.reshape(1) if scheme.group == (-1, -1) else numbers


def _global_scale(name: str, q: QuantTensor) -> Tensor:
    """The number that divides: the one that was read, or one whose reciprocal is the tensor_scale."""
    assert q.tensor_scale is not None
    about = 1 / q.tensor_scale
    around = [torch.nextafter(about, about.new_tensor(end)) for end in (0.0, torch.inf)]
    read = _origin(q).get("weight_global_scale")
    for scale in ([] if read is None else [read]) + [about, *around]:
        if torch.equal(1 / scale.reshape(1), q.tensor_scale):
            return scale
    value = q.tensor_scale.item()
    raise UnsupportedError(f"{name} has the tensor_scale {value!r}, the reciprocal of no fp32 number: its divisor cannot be stored")


def _stacked(each: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    stacked = {leaf: torch.stack([held[leaf] for held in each]) for leaf in each[0]}
    if "weight_shape" in stacked:
        stacked["weight_shape"] = torch.cat([torch.tensor([len(each)]), each[0]["weight_shape"]])
    return stacked


def _settings(made: Mapping[Scheme, list[str]]) -> dict[str, Any]:
    formats = sorted({scheme.format for scheme in made})
    stated = {
        f"group_{i}": {"targets": modules, "format": scheme.format, "weights": _weights(scheme), "input_activations": None}
        for i, (scheme, modules) in enumerate(made.items())
    }
    format = formats[0] if len(formats) == 1 else "mixed-precision"
    head = {"quant_method": "compressed-tensors", "version": VERSION, "format": format, "quantization_status": "compressed"}
    return {**head, "config_groups": stated, "ignore": []}


def _weights(scheme: Scheme) -> dict[str, Any]:
    n, k = scheme.group
    strategy = "tensor" if n == -1 else "block" if n > 1 or (k > 1 and n != 1) else "channel" if k == -1 else "group"
    stated: dict[str, Any] = {
        "num_bits": scheme.code.bits,
        "type": "int" if isinstance(scheme.code, Int) else "float",
        "symmetric": scheme.symmetric,
        "strategy": "tensor_group" if scheme.format.startswith("nvfp4") else strategy,
        "dynamic": False,
    }
    if strategy == "block":
        stated["block_structure"] = [n, k]
    elif strategy == "group":
        stated["group_size"] = k
    if scheme.indexed:
        stated["actorder"] = "group"
    if scheme.format.startswith(("mx", "nv")):
        stated["scale_dtype"] = "torch.uint8" if scheme.format.startswith("mx") else "torch.float8_e4m3fn"
    return stated
