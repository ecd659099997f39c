"""Hugging Face models as GGUF files have them: names, order of rows, norms, stacked experts; llama.cpp's mixes of types."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qkernels import formats
from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import QuantFormat, QuantStack, QuantTensor
from qkernels.formats.ggml import TYPES
from qkernels.formats.rows import take
from qkernels.io import gguf, gguf_file, gguf_names
from qkernels.io.detect import CheckpointInfo
from qkernels.io.forms import forms
from qkernels.io.gguf_config import derived

Value = QuantTensor | QuantStack | Tensor
# mix -> (the type of most tensors, the one of those that matter most, llama.cpp's number of the mix)
MIXES = {
    "Q4_0": ("q4_0", "q4_0", 2),
    "Q4_1": ("q4_1", "q4_1", 3),
    "Q8_0": ("q8_0", "q8_0", 7),
    "Q5_0": ("q5_0", "q5_0", 8),
    "Q5_1": ("q5_1", "q5_1", 9),
    "Q4_K_M": ("q4_k", "q6_k", 15),
    "Q5_K_M": ("q5_k", "q6_k", 17),
    "Q6_K": ("q6_k", "q6_k", 18),
}
_NVFP4 = 40  # ggml's id
_NARROWER = {"q2_k": "q4_0", "q3_k": "q4_0", "q4_k": "q5_0", "q5_k": "q5_1", "q6_k": "q8_0"}  # where K is no multiple of 256


def items(source: Iterable[tuple[str, Value]], settings: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[tuple[str, Value]]:
    """Rename a model's tensors, reorder the rows of q and k, add what norms lack, and stack experts, held until all of a tensor are there.

    settings   of `key_values`, which were made of config
    Gemma's head is left out where a checkpoint has it: it is tied, and llama.cpp knows no other.
    """
    yield from derived(config).items()
    arch = settings["general.architecture"]
    count = settings.get(f"{arch}.expert_count", 0)
    gathered: dict[str, dict[int, Value]] = {}
    for hf_name, value in source:
        name, expert = gguf_names.to_gguf(arch, hf_name)
        if name == "output.weight" and arch in ("gemma2", "gemma3"):
            continue
        value = _as_stored(arch, name, value, settings)
        if expert is None:
            yield name, value
            continue
        experts = gathered.setdefault(name, {})
        experts[expert] = value
        if len(experts) == count:
            yield name, _stacked(name, [experts[e] for e in sorted(experts)])
            del gathered[name]
    if gathered:
        held = {name: f"{len(experts)} of {count} experts" for name, experts in gathered.items()}
        raise CheckpointError(f"experts are missing: {held}")


def _as_stored(arch: str, name: str, value: Value, settings: Mapping[str, Any]) -> Value:
    heads = gguf_names.rotated_heads(arch, name, settings)
    if heads is not None:
        value = _take_rows(name, value, gguf_names.rows_to_gguf(value.shape[0], heads))
    if ".ffn_gate_inp_shexp." in name:
        value = value[0] if isinstance(value, Tensor) else replace(value, origin={"axes": 1})  # type: ignore[arg-type]  # no stack
    if isinstance(value, Tensor) and (value.dim() == 1 or ".ffn_gate_inp." in name):
        value = value.float() + gguf_names.norm_offset(arch, name)  # llama.cpp wants its norms, biases and routers in fp32
    return value


def as_in_hf(arch: str, name: str, value: Value, settings: Mapping[str, Any]) -> Value:
    """Undo what llama.cpp's converters do to a weight.

    Raises CheckpointError where the key-values do not say of how many heads the rows of q and k are, or it cannot be so many.
    """
    if (heads := gguf_names.rotated_heads(arch, name, settings)) is not None:
        return _take_rows(name, value, gguf_names.rows_to_hf(value.shape[0], heads))
    if isinstance(value, Tensor):
        if offset := gguf_names.norm_offset(arch, name):
            return value.float() - offset
        if ".ffn_gate_inp_shexp." in name:
            return value.reshape(1, -1)  # of one output
    return value


def _take_rows(name: str, value: Value, rows: Tensor) -> QuantTensor | Tensor:
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, QuantStack):
        raise UnsupportedError(f"{name} is a stack {list(value.shape)}, and has the name of a weight whose rows are reordered")
    return take(value, rows)


def _stacked(name: str, experts: list[Value]) -> Value:
    if all(isinstance(e, Tensor) for e in experts):
        return torch.stack([e for e in experts if isinstance(e, Tensor)])
    if not all(isinstance(e, QuantTensor) for e in experts):
        raise UnsupportedError(f"{name}: some of its experts are quantised and some are not")
    return QuantStack.of([e for e in experts if isinstance(e, QuantTensor)])


def with_scales(info: CheckpointInfo) -> Iterator[tuple[str, Value]]:
    """The tensors of a file, its NVFP4 weights with the scale that "<name>.scale" has for each, or for each expert of it, as their own.

    "<name>.input_scale", which is for activations, is left out. Raises UnsupportedError for a scale but 1 beside a weight of another type,
    CheckpointError for one that is no float32 for each weight.
    """
    names = {t.name for path in info.files for t in gguf_file.parse(path).tensors}
    owners = {f"{stem}.scale": f"{stem}.weight" for name in names if (stem := name.removesuffix(".scale")) != name}
    scales = {owners[name]: value for name, value in gguf.some(info, owners).items()}
    if alone := sorted(set(owners.values()) - names):
        raise CheckpointError(f"{info.path} has {alone[0].removesuffix('weight')}scale, and no {alone[0]}")
    for name, value in gguf.read(info):
        if name in scales:
            yield name, _scaled(name, value, scales[name])
        elif name not in owners and not name.endswith(".input_scale"):
            yield name, value


def _scaled(name: str, value: Value, scale: Value) -> Value:
    own = f"{name.removesuffix('weight')}scale"
    count = len(value) if isinstance(value, QuantStack) else 1
    if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or tuple(scale.shape) != (count,):
        raise CheckpointError(f"{own} is {list(scale.shape)}; {count} numbers of float32 are needed, one for each weight")
    if bool((scale == 1).all()):
        return value
    if isinstance(value, Tensor) or value.format != TYPES[_NVFP4]:
        kind = value.dtype if isinstance(value, Tensor) else value.format.name
        raise UnsupportedError(f"{own} is a scale beside a weight of {kind}; it is held of {TYPES[_NVFP4].name} alone")
    if isinstance(value, QuantStack):
        return QuantStack.of([_of_scale(value[e], scale[e : e + 1]) for e in range(count)])
    return _of_scale(value, scale)


def _of_scale(q: QuantTensor, scale: Tensor) -> QuantTensor:
    """The same codes and scales of groups, not in blocks, and the scale of all."""
    _, grouped, *_ = forms(q)
    return replace(grouped, format=replace(grouped.format, tensor_scale=True, name=""), tensor_scale=scale.clone())


def to_hf(info: CheckpointInfo) -> Iterator[tuple[str, Value]]:
    """A GGUF file's tensors under the names of Hugging Face, q and k in the order of its rows, norms without what was added."""
    arch, settings = str(info.settings.get("general.architecture")), info.settings
    for name, value in with_scales(info):
        hf = gguf_names.to_hf(arch, name)
        if hf is None:
            continue
        value = as_in_hf(arch, name, value, settings)
        if "*" in hf and not isinstance(value, QuantTensor):
            yield from ((hf.replace("*", str(e)), value[e]) for e in range(value.shape[0]))
        else:
            yield hf, value


def type_of(mix: str, name: str, k: int, layers: int, tied: bool) -> QuantFormat | None:
    """The type in which a mix stores a weight; None: it stays as it is. Source: llama.cpp's llama-quant.cpp.

    name     in the GGUF file
    layers   how many the model has
    tied     the embedding is the output too
    """
    stem = name.removesuffix(".weight").rpartition(".")[2]
    if not name.endswith(".weight") or "norm" in stem or stem.startswith(("ffn_gate_inp", "rope_", "position")) or k % 32:
        return None
    most, best, _ = MIXES[mix]
    if stem == "output" or (stem == "token_embd" and tied):
        most = "q8_0" if most == "q8_0" else "q6_k"
    elif stem == "attn_qkv":
        most = {"Q4_K_M": "q5_k", "Q5_K_M": "q6_k"}.get(mix, most)
    elif stem in ("attn_v", "ffn_down", "ffn_down_exps"):
        i = int(name.split(".")[1])
        if i < layers // 8 or i >= 7 * layers // 8 or (i - layers // 8) % 3 == 2:
            most = best
    return formats.get(_fitting(most, k))


def nearest(bits: int, k: int) -> QuantFormat:
    """The type of ggml of so many bits for rows of K; FormatError where K fits none."""
    name = _fitting({2: "q2_k", 3: "q3_k", 4: "q4_k", 5: "q5_k", 6: "q6_k"}.get(bits, "q8_0"), k)
    if k % 32:
        raise FormatError(f"K = {k}; ggml's blocks have 32 or 256 elements")
    return formats.get(name)


def _fitting(name: str, k: int) -> str:
    return _NARROWER[name] if name in _NARROWER and k % 256 else name
