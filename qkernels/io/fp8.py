"""FP8 checkpoints: DeepSeek's blocks and their kin (`quant_method: fp8`), scales per tensor or row, `fbgemm_fp8` and `mxfp8`.

    X.weight [N, K] float8      X.weight_scale_inv or X.weight_scale or X.scale     W = weight * scale, whatever "inv" says

but for GPTQModel's with weight_scale_semantics = "inverse", which divide: their reciprocals multiply here, an ulp of float32 away.

Scales: one, one a row, or one per block of `weight_block_size`, the last blocks cut off; float32 or another float, or exponents
(float8_e8m0fnu, or uint8). Experts in one tensor are X.gate_up_proj [E, N, K] with X.gate_up_proj_scale_inv: a QuantStack of that name.
FP4 experts ("expert_dtype": "fp4") are int8 [N, K / 2] with an exponent per 32. Scales of activations and caches
(modules.ACTIVATION_LEAVES) come as plain tensors. Source: transformers 5.23 and the checkpoints of DeepSeek, Qwen and fbgemm.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.io import checked, floats
from qkernels.io.modules import dense
from qkernels.io.settings import Settings
from qkernels.io.weights import Value


def read(tensors: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Yield (name, QuantTensor or QuantStack) for each FP8 weight, and every other tensor as stored.

    Raises CheckpointError for an FP8 tensor without a scale, a scale whose weight is no FP8, scales of another shape, and a quantised
    module that the settings leave out.
    """
    block, kept, fp4_experts, divides = _parse(settings)
    tensors = _Reciprocals(tensors) if divides else tensors
    scale_of = _pairs(tensors)
    scales = set(scale_of.values())
    for name in tensors:
        if name in scale_of:
            module = name.removesuffix(".weight")
            if any(module == part or module.endswith(f".{part}") or module.startswith(f"{part}.") for part in kept):
                raise CheckpointError(f"{name} has the scale {scale_of[name]}, and the settings list it among those that are not quantised")
            yield from _weight(tensors, name, scale_of[name], block, fp4_experts)
        elif name not in scales:
            yield name, dense(name, tensors[name])


def _parse(settings: Mapping[str, Any]) -> tuple[tuple[int, ...] | None, list[str], bool, bool]:
    """(block size, modules that are not quantised, whether experts are FP4, whether scales divide)"""
    s = Settings(settings, "quantization_config")
    s.take("quant_method", of=str, choices=["fp8", "fbgemm_fp8", "mxfp8"])
    s.take("fmt", of=str, default="e4m3", choices=["e4m3", "float8_e4m3fn"])
    s.take("scale_fmt", of=str, default="float", choices=["float", "ue8m0"])
    block = s.take("weight_block_size", of=list, default=None)
    block = None if block is None else checked.extents(block, 2, f"{s.where}: weight_block_size")
    kept = s.names("modules_to_not_convert", "ignored_layers")
    experts = s.take("expert_dtype", of=str, default="fp8", choices=["fp8", "fp4"])
    s.ignore("activation_scheme", "activation_scale_ub", "kv_cache_scheme", "modules_to_convert", "dequantize")
    divides = s.take("weight_scale_semantics", of=str, default="", choices=["inverse"]) == "inverse"
    s.take("bits", of=int, default=8, choices=[8])  # GPTQModel's
    s.take("method", of=str, default="fp8", choices=["fp8"])
    if s.take("weight_scale_method", of=str, default=None) and not divides:
        raise CheckpointError(f"{s.where} has weight_scale_method, GPTQModel's, and no weight_scale_semantics: do the scales divide?")
    if divides:  # GPTQModel's, which the tensors tell
        s.ignore("format", "checkpoint_format", "group_size", "desc_act", "sym", "pack_dtype", "lm_head", "dynamic", "meta")
    s.done()
    return block, kept, experts == "fp4", divides


class _Reciprocals(Mapping[str, Tensor]):
    """Tensors whose scales are those that multiply, where GPTQModel's divide."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        t = self._tensors[name]
        return 1 / t if name.endswith(".weight_scale_inv") and t.dtype == torch.float32 else t

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _pairs(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name of each weight that has a scale -> that of the scale; CheckpointError for two scales of one weight."""
    found: dict[str, str] = {}
    for name in tensors:
        weight = next((name.removesuffix(end) for end in ("_scale_inv", "_scale") if name.endswith(end)), None)
        if name.endswith(".scale"):
            weight = f"{name.removesuffix('.scale')}.weight"
        if weight is None or weight not in tensors:
            continue
        if weight in found:
            raise CheckpointError(f"{weight} has two scales: {found[weight]} and {name}")
        found[weight] = name
    return found


def _weight(
    tensors: Mapping[str, Tensor], name: str, scale: str, block: Sequence[int] | None, fp4_experts: bool
) -> Iterator[tuple[str, Value]]:
    weight = tensors[name]
    if floats.is_fp8(weight) and weight.dtype != torch.float4_e2m1fn_x2:
        yield name, floats.fp8(name, weight, scale, tensors[scale], block)
    elif fp4_experts and weight.dtype in (torch.int8, torch.uint8, torch.float4_e2m1fn_x2):
        scales = floats.exponents(tensors[scale])
        if scales.dtype != torch.float8_e8m0fnu:
            raise CheckpointError(f"{scale} is {scales.dtype}; FP4 weights have exponents: float8_e8m0fnu or uint8")
        yield name, floats.fp4(name, weight, scales, floats.MX_GROUP)
    elif scale.endswith(".scale"):  # a name that other modules have too
        yield name, dense(name, weight)
        yield scale, dense(scale, tensors[scale])
    else:
        raise CheckpointError(f"{name} is {weight.dtype} and has the scale {scale}; FP8 weights do")
