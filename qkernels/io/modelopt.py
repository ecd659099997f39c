"""NVIDIA's ModelOpt: NVFP4 and FP8, as hf_quant_config.json or config.json state them.

    NVFP4, W4A16_NVFP4           weight [N, K / 2] uint8, weight_scale [N, K / 16] float8_e4m3fn, weight_scale_2 [] float32: they multiply
    FP8                          weight [N, K] float8_e4m3fn, weight_scale []
    FP8_PER_CHANNEL_PER_TOKEN    weight_scale [N]
    FP8_PB_WO                    weight_scale of blocks of 128 x 128, with or without extents of 1 between: [N / 128, 1, K / 128, 1]
    MXFP8                        weight_scale [N, K / 32] uint8: exponents
    MIXED_PRECISION              one of these for each module of `quantized_layers`

Scales of activations and caches (modules.ACTIVATION_LEAVES) come as plain tensors, and so does a `pre_quant_scale` [K], which the input of
its layer has to be multiplied by: no canonical weight says that. Source: vLLM 0.32 and ModelOpt's export.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.io import floats
from qkernels.io.modules import PRE_QUANT_SCALE, Module, walk
from qkernels.io.settings import Settings
from qkernels.io.weights import Value

MARKS = ("weight_scale", "weight_scale_2", PRE_QUANT_SCALE)
LEAVES = ("weight", *MARKS)
BLOCK = [128, 128]
_FP4 = ("NVFP4", "W4A16_NVFP4", "NVFP4_AWQ")
_FP8 = ("FP8", "FP8_PER_CHANNEL_PER_TOKEN", "FP8_PB_WO", "FP8_BLOCK_SCALES", "MXFP8")
_GROUPS = dict.fromkeys(_FP4, 16) | {"FP8_PB_WO": 128, "FP8_BLOCK_SCALES": 128, "MXFP8": 32}


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yield ("<module>.weight", QuantTensor) for each quantised module, and every other tensor as stored.

    Raises CheckpointError for codes without scales, scales of another shape or type, and a quantised module that is excluded.
    """
    algorithm, layers, excluded = _parse(settings)
    for name, found in walk(tensors, MARKS, LEAVES):
        if isinstance(found, Tensor):
            yield name, found
            continue
        if any(fnmatch.fnmatchcase(found.name, pattern) for pattern in excluded):
            raise CheckpointError(f"{name} has a scale, and exclude_modules says that it is not quantised")
        if layers is not None and found.name not in layers:
            raise CheckpointError(f"{name} has a scale, and quantized_layers does not list it")
        value = _weight(found, algorithm if layers is None else layers[found.name])
        yield name, value
        if (scale := found.find(PRE_QUANT_SCALE, torch.float32, torch.float16, torch.bfloat16, shape=(value.shape[-1],))) is not None:
            yield found.full(PRE_QUANT_SCALE), scale
        found.done()


def _weight(module: Module, algorithm: str) -> QuantTensor | QuantStack:
    name, scale = module.full("weight"), module.full("weight_scale")
    if algorithm in _FP4:
        scales = module.take("weight_scale", torch.float8_e4m3fn)
        tensor_scale = module.numbers("weight_scale_2", torch.float32, shape=(1,))
        return floats.fp4(name, module.take("weight", torch.uint8), scales, floats.NV_GROUP, tensor_scale=tensor_scale)
    weight = module.take("weight", torch.float8_e4m3fn)
    scales = module.take("weight_scale", *floats.SCALES, torch.uint8)
    if algorithm in ("FP8_PB_WO", "FP8_BLOCK_SCALES"):
        if scales.dim() == 4 and scales.shape[1] == scales.shape[3] == 1:
            scales = scales[:, 0, :, 0]
        if scales.dim() != 2:
            raise CheckpointError(f"{scale} is {list(scales.shape)}; {algorithm} has blocks of {BLOCK}")
        return floats.fp8(name, weight, scale, scales, BLOCK)
    if (scales.dtype in (torch.uint8, torch.float8_e8m0fnu)) != (algorithm == "MXFP8"):
        raise CheckpointError(f"{scale} is {scales.dtype}, which contradicts the quant_algo {algorithm}")
    if algorithm == "FP8" and scales.numel() != 1:
        raise CheckpointError(f"{scale} is {list(scales.shape)}; the quant_algo FP8 has one scale for a weight")
    return floats.fp8(name, weight, scale, scales, None)


def _parse(settings: Mapping[str, Any]) -> tuple[str, dict[str, str] | None, list[str]]:
    """(algorithm, that of each layer where they differ, patterns of modules that are not quantised)"""
    outer = Settings(settings, "the ModelOpt settings")
    outer.take("quant_method", of=str, default="modelopt", choices=["modelopt", "modelopt_fp4"])
    outer.ignore("producer")
    s = outer.inner("quantization") or outer
    algorithm = _algorithm(s, ("MIXED_PRECISION",))
    layers = s.take("quantized_layers", of=dict, default=None)
    excluded = s.names("exclude_modules", "ignore")
    if s.take("has_zero_point", of=bool, default=False):
        raise UnsupportedError(f"{s.where}: has_zero_point is True; floats are read without zero points")
    for name, group in s.take("config_groups", of=dict, default={}).items():
        _check_group(Settings(group, f"{s.where}: {name}"), algorithm)
    s.ignore("kv_cache_quant_algo", "kv_cache_scheme", "pre_quant_scale", "smoothquant_val")  # what the tensors are tells it
    s.done()
    outer.done()
    if algorithm != "MIXED_PRECISION":
        return algorithm, None, excluded
    if layers is None:
        raise CheckpointError(f"{s.where} lacks quantized_layers, and quant_algo is MIXED_PRECISION")
    return algorithm, {name: _of_layer(Settings(layer, f"{s.where}: {name}")) for name, layer in layers.items()}, excluded


def _algorithm(s: Settings, others: tuple[str, ...] = ()) -> str:
    algorithm = s.take("quant_algo", of=str).upper()
    if algorithm not in (*_FP4, *_FP8, *others):
        raise UnsupportedError(f"{s.where}: quant_algo is {algorithm!r}, which is not read; {', '.join((*_FP4, *_FP8, *others))} are")
    size = s.take("group_size", of=int, default=None)
    if size is not None and _GROUPS.get(algorithm) not in (None, size):
        raise CheckpointError(f"{s.where}: group_size is {size}, and {algorithm} has groups of {_GROUPS[algorithm]}")
    return algorithm


def _of_layer(s: Settings) -> str:
    algorithm = _algorithm(s)
    s.ignore("kv_cache_quant_algo", "has_zero_point", "pre_quant_scale")
    s.done()
    return algorithm


def _check_group(group: Settings, algorithm: str) -> None:
    """A group as in compressed-tensors, beside quant_algo: the two must agree."""
    group.ignore("targets", "input_activations", "output_activations", "format")
    weights = group.inner("weights")
    group.done()
    if weights is None:
        return
    size = weights.take("group_size", of=int, default=None)
    if size is not None and _GROUPS.get(algorithm) not in (None, size):
        raise CheckpointError(f"{weights.where}: group_size is {size}, and {algorithm} has groups of {_GROUPS[algorithm]}")
    weights.take("type", of=str, default="float", choices=["float"])
    weights.take("num_bits", of=int, default=8, choices=[4, 8])
    weights.ignore("dynamic", "symmetric", "strategy", "block_structure", "scale_dtype", "zp_dtype", "observer", "observer_kwargs")
    weights.done()
