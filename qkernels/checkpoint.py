"""save and load a patched model: canonical tensors, bit for bit."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import nn

from qkernels import formats
from qkernels.convert import _set
from qkernels.errors import CheckpointError, FormatError
from qkernels.io import native
from qkernels.linear import QuantLinear


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Save a model with QuantLinears to a directory (safetensors + JSON); it appears whole or not at all.

    Tied tensors are stored once. Raises CheckpointError when `path` exists and is something else.
    """
    layers: dict[str, Any] = {}
    first: dict[int, str] = {}
    for name, m in model.named_modules(remove_duplicate=False):
        if isinstance(m, QuantLinear):
            layers[name] = {"format": m.format.name, "shape": [m.out_features, m.in_features], "compute": m.compute}
            if (shared_with := first.setdefault(id(m), name)) != name:
                layers[name]["shared_with"] = shared_with
    tensors: dict[str, torch.Tensor] = {}
    seen: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, t in model.state_dict().items():
        layer = layers.get(name.rpartition(".")[0])
        if layer is None:  # tied tensors lie in the same memory
            key = (t.untyped_storage().data_ptr(), t.storage_offset(), t.shape, t.dtype)
            if t.numel() and seen.setdefault(key, name) != name:
                tied[name] = seen[key]
                continue
        elif "shared_with" in layer:
            continue
        tensors[name] = t
    native.write(path, tensors, layers, tied)


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Load a directory that `save` wrote into a skeleton of the same architecture (also one on the meta device); return it.

    The linears that were quantised are replaced. Raises CheckpointError, and leaves the model as it was, when the directory is
    truncated or edited, or does not fit the model.
    """
    tensors, layers, tied = native.read(path)
    made: dict[str, QuantLinear] = {}
    for name, entry in layers.items():
        shared_with = entry.get("shared_with")
        made[name] = made[shared_with] if shared_with in made else _layer(model, name, entry, tensors)
    rest = {name: t for name, t in tensors.items() if not any(name.startswith(f"{layer}.") for layer in made)}
    _check_rest(model, rest, tied, made)
    for name, layer in made.items():
        _set(model, name, layer)
    model.load_state_dict(rest, strict=False, assign=any(t.is_meta for t in (*model.parameters(), *model.buffers())))
    for name, source in tied.items():
        _tie(model, name, source)
    return model


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Make parameter `name` the very parameter `source`; buffers take its values."""
    (parent, _, leaf), (source_parent, _, source_leaf) = name.rpartition("."), source.rpartition(".")
    setattr(model.get_submodule(parent), leaf, getattr(model.get_submodule(source_parent), source_leaf))


def _layer(model: nn.Module, name: str, entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> QuantLinear:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the model has no layer {name!r}") from None
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"layer {name!r} is a {type(linear).__name__}, not a Linear")
    shape = [linear.out_features, linear.in_features]
    if entry.get("shape") != shape:
        raise CheckpointError(f"layer {name!r} was saved as {entry.get('shape')}, the model's is {shape}")
    prefix = f"{name}."
    mine = {key.removeprefix(prefix): t for key, t in tensors.items() if key.startswith(prefix)}
    try:
        layer: QuantLinear = QuantLinear(
            shape[1], shape[0], "bias" in mine, formats.get(entry["format"]), compute=entry["compute"], device="meta"
        )
        layer.load_state_dict(mine, strict=True, assign=True)
    except (FormatError, RuntimeError) as error:
        raise CheckpointError(f"layer {name!r}: {error}") from error
    if layer.bias is not None and linear.bias is not None:
        layer.bias.requires_grad_(linear.bias.requires_grad)
    return layer.train(linear.training)


def _check_rest(model: nn.Module, rest: dict[str, torch.Tensor], tied: dict[str, str], made: dict[str, QuantLinear]) -> None:
    own = {k: t for k, t in model.state_dict().items() if not any(k.startswith(f"{layer}.") for layer in made)}
    for name, t in rest.items():
        if name not in own:
            raise CheckpointError(f"the model has no tensor {name!r}")
        if own[name].shape != t.shape:
            raise CheckpointError(f"{name!r} was saved as {list(t.shape)}, the model's is {list(own[name].shape)}")
    for name in own:
        if name not in rest and tied.get(name) not in rest:
            raise CheckpointError(f"{name!r} of the model is not in the saved directory")
    for name in tied:
        if name not in own:
            raise CheckpointError(f"the model has no tensor {name!r}")
