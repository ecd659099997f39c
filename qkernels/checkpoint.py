"""save and load a patched model: canonical tensors, bit for bit."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from qkernels import formats
from qkernels.convert import _set, tie_key
from qkernels.embedding import QuantEmbedding
from qkernels.errors import CheckpointError, FormatError
from qkernels.formats import QuantTensor
from qkernels.formats.tensor import FIELDS
from qkernels.io import native
from qkernels.linear import _TENSORS, QuantLinear
from qkernels.progress import pulse, track
from qkernels.scaled import SCALE, ScaledLinear


def save(model: nn.Module, path: str | os.PathLike[str], *, progress: bool = True) -> None:
    """Save a model with QuantLinears to a directory (safetensors + JSON); it appears whole or not at all.

    A directory that `save` wrote before is replaced; other files in it (a tokenizer, a README) stay. Tied tensors are stored once.
    Raises CheckpointError when `path` is something else or cannot be written, for a model on the meta device, and for a format that
    `load` could not find by its name; what lies at `path` is then as it was.
    """
    with pulse(progress, f"saving to {path}"):
        layers, state = layers_of(model), model.state_dict()
        _check_saveable(model, state)
        names, tied = stored_names(state, layers)
        with native.Writer(path, layers, tied) as writer:
            for name in names:
                writer.add(name, state[name])


def _check_saveable(model: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    if meta := next((name for name, t in state.items() if t.is_meta), None):
        raise CheckpointError(f"{meta} is on the meta device, which holds no values; load or initialise the model, then save it")
    for name, m in model.named_modules():
        if isinstance(m, QuantLinear | QuantEmbedding) and not formats.is_known(m.format):
            raise CheckpointError(f"{name} has the format {m.format.name}, which no name finds again; register it (docs/add_a_format.md)")


def layers_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """What qkernels.json says of QuantLinears and QuantEmbeddings.

    A QuantLinear that has a second name in the model is `shared_with` the first; an embedding that is tied to one has the `rows_of` it.
    """
    layers: dict[str, dict[str, Any]] = {}
    modules = list(model.named_modules(remove_duplicate=False))
    first = {id(m): name for name, m in reversed(modules) if isinstance(m, QuantLinear)}
    for name, m in modules:
        if isinstance(m, QuantEmbedding):
            shape, dtype = [m.num_embeddings, m.embedding_dim], str(m.dtype).removeprefix("torch.")
            layers[name] = {"format": m.format.name, "shape": shape, "compute": "auto", "dtype": dtype}
            if (head := first.get(id(m.head))) is not None:
                layers[name]["rows_of"] = head
        elif isinstance(m, QuantLinear):
            layers[name] = {"format": m.format.name, "shape": [m.out_features, m.in_features], "compute": m.compute}
            if first[id(m)] != name:
                layers[name]["shared_with"] = first[id(m)]
            elif m.dense_dtype is not None:
                layers[name]["dtype"] = str(m.dense_dtype).removeprefix("torch.")
    return layers


def stored_names(state: Mapping[str, torch.Tensor], layers: Mapping[str, Mapping[str, Any]]) -> tuple[list[str], dict[str, str]]:
    """Of a state_dict (with keep_vars=True on the meta device) the names to save, and the tied ones: name -> saved name."""
    names: list[str] = []
    seen: dict[Any, str] = {}
    tied: dict[str, str] = {}
    for name, t in state.items():
        layer = layers.get(name.rpartition(".")[0])
        if layer is None:
            if t.numel() and seen.setdefault(tie_key(t), name) != name:
                tied[name] = seen[tie_key(t)]
                continue
        elif "shared_with" in layer or "rows_of" in layer:
            continue
        names.append(name)
    return names, tied


def load(model: nn.Module, path: str | os.PathLike[str], *, batch_invariant: bool = False, progress: bool = True) -> nn.Module:
    """Load a directory that `save` wrote into a skeleton of the same architecture (also one on the meta device); return it.

    The linears that were quantised are replaced. What was saved is what the model gets, bit for bit, on the skeleton's device (the CPU
    for meta): as with `load_state_dict(assign=True)`, parameters become new ones of the saved dtype, whatever the skeleton's. So a
    skeleton in float32 becomes a bfloat16 model if that was saved; `.float()` afterwards makes it a float32 one.
    batch_invariant asks for it as in `replace_linear`: it is not saved.
    Raises CheckpointError, and leaves the model as it was, when the directory is truncated or edited, or does not fit the model.
    """
    tensors, layers, tied = native.read(path, progress)
    leaves: dict[str, list[str]] = {}
    for name in tensors:
        leaves.setdefault(name.rpartition(".")[0], []).append(name.rpartition(".")[2])
    made: dict[str, nn.Module] = {}
    for name, entry in track(sorted(layers.items(), key=lambda item: "rows_of" in item[1]), progress, f"loading {path}"):
        if (shared_with := entry.get("shared_with")) in made:
            made[name] = made[shared_with]
            continue
        owner = entry.get("rows_of", name)
        mine = {leaf: tensors[f"{owner}.{leaf}"] for leaf in leaves.get(owner, ())}
        made[name] = _layer(model, name, entry, mine, batch_invariant)
        if owner != name:
            _share(name, made[name], owner, made.get(owner))
    own = {name: t for name, t in model.state_dict().items() if name.rpartition(".")[0] not in made}
    rest = {name: tensors[name] for name in tensors if name.rpartition(".")[0] not in made}
    _check_rest(own, rest, tied)
    _fill_buffers(model)
    for name, layer in made.items():
        _set(model, name, layer)
    model.load_state_dict({name: _beside(own[name], t) for name, t in rest.items()}, strict=False, assign=True)
    for name, source in tied.items():
        _tie(model, name, source)
    return model


def _beside(own: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    """t where the skeleton's own tensor is; the meta device holds no place."""
    return t if own.is_meta else t.to(own.device)


def _fill_buffers(model: nn.Module) -> None:
    """Give the meta buffers that no checkpoint holds (persistent=False) their values, which the model must know how to make.

    transformers' models do: `initialize_weights` sets what does not bear the mark `_is_hf_initialized`.
    """
    persistent = model.state_dict().keys()
    held = {name: b for name, b in model.named_buffers() if b.is_meta and name not in persistent}
    if not held:
        return
    owners = {name: model.get_submodule(name.rpartition(".")[0]) for name in held}
    for module in model.modules():
        module._is_hf_initialized = module not in owners.values()  # type: ignore[assignment]
    for owner in owners.values():
        for t in (*owner.parameters(recurse=False), *owner.buffers(recurse=False)):
            t._is_hf_initialized = True  # type: ignore[attr-defined]
    empty = {name: torch.empty_like(b, device="cpu") for name, b in held.items()}
    versions = {name: b._version for name, b in empty.items()}
    _set_buffers(owners, empty)
    getattr(model, "initialize_weights", lambda: None)()
    left = [name for name, b in empty.items() if model.get_buffer(name) is b and b._version == versions[name]]  # nobody wrote to it
    if left:
        _set_buffers(owners, held)
        raise CheckpointError(f"buffers {', '.join(left)} of the skeleton are on the meta device and never saved: build them on the CPU")


def _set_buffers(owners: Mapping[str, nn.Module], buffers: Mapping[str, torch.Tensor]) -> None:
    for name, buffer in buffers.items():
        setattr(owners[name], name.rpartition(".")[2], buffer)


def _tie(model: nn.Module, name: str, source: str) -> None:
    """Make parameter `name` the very parameter `source`; buffers take its values."""
    (parent, _, leaf), (source_parent, _, source_leaf) = name.rpartition("."), source.rpartition(".")
    setattr(model.get_submodule(parent), leaf, getattr(model.get_submodule(source_parent), source_leaf))


def _layer(model: nn.Module, name: str, entry: dict[str, Any], mine: dict[str, torch.Tensor], batch_invariant: bool) -> nn.Module:
    try:
        linear = model.get_submodule(name)
    except AttributeError:
        raise CheckpointError(f"the model has no layer {name!r}") from None
    if isinstance(linear, nn.Embedding):
        return _embedding(linear, name, entry, mine)
    if not isinstance(linear, nn.Linear):
        raise CheckpointError(f"layer {name!r} is a {type(linear).__name__}, not a Linear")
    shape = [linear.out_features, linear.in_features]
    if entry.get("shape") != shape:
        raise CheckpointError(f"layer {name!r} was saved as {entry.get('shape')}, the model's is {shape}")
    try:
        layer: QuantLinear = QuantLinear(
            shape[1],
            shape[0],
            "bias" in mine,
            formats.get(entry["format"]),
            compute=entry["compute"],
            batch_invariant=batch_invariant,
            device="meta",
            dtype=getattr(torch, entry["dtype"]) if "dtype" in entry else None,
        )
        held = {leaf: _beside(linear.weight, t) for leaf, t in mine.items()}
        scale = held.pop(SCALE, None)
        layer.load_state_dict(held, strict=True, assign=True)
        layer = layer if scale is None else ScaledLinear.of(layer, scale)
    except (FormatError, RuntimeError) as error:
        raise CheckpointError(f"layer {name!r}: {error}") from error
    if layer.bias is not None and linear.bias is not None:
        layer.bias.requires_grad_(linear.bias.requires_grad)
    return layer.train(linear.training)


def _embedding(embedding: nn.Embedding, name: str, entry: dict[str, Any], mine: dict[str, torch.Tensor]) -> QuantEmbedding:
    shape = [embedding.num_embeddings, embedding.embedding_dim]
    if entry.get("shape") != shape:
        raise CheckpointError(f"embedding {name!r} was saved as {entry.get('shape')}, the model's is {shape}")
    tensors = {field: _beside(embedding.weight, mine[leaf]) for leaf, field in zip(_TENSORS, FIELDS, strict=True) if leaf in mine}
    try:
        q = QuantTensor.from_tensors(formats.get(entry["format"]), (shape[0], shape[1]), tensors)
    except (FormatError, TypeError) as error:
        raise CheckpointError(f"embedding {name!r}: {error}") from error
    return QuantEmbedding(embedding, q, getattr(torch, entry.get("dtype", "float32"))).train(embedding.training)


def _share(name: str, embedding: nn.Module, owner: str, head: nn.Module | None) -> None:
    if not isinstance(embedding, QuantEmbedding) or not isinstance(head, QuantLinear):
        kinds = f"{type(embedding).__name__}, {type(head).__name__}"
        raise CheckpointError(f"{name!r} was saved as an embedding with the rows of the linear {owner!r}; in the model they are {kinds}")
    try:
        embedding.share(head)
    except FormatError as error:
        raise CheckpointError(f"embedding {name!r}: {error}") from error


def _check_rest(own: dict[str, torch.Tensor], rest: dict[str, torch.Tensor], tied: dict[str, str]) -> None:
    for name, t in rest.items():
        if name not in own:
            raise CheckpointError(f"the model has no tensor {name!r}")
        if own[name].shape != t.shape:
            raise CheckpointError(f"{name!r} was saved as {list(t.shape)}, the model's is {list(own[name].shape)}")
        if own[name].dtype != t.dtype and not (own[name].is_floating_point() and t.is_floating_point()):
            raise CheckpointError(f"{name!r} was saved as {t.dtype}, the model's is {own[name].dtype}: only floats may differ in dtype")
    for name in own:
        if name not in rest and tied.get(name) not in rest:
            raise CheckpointError(f"{name!r} of the model is not in the saved directory")
    for name in tied:
        if name not in own:
            raise CheckpointError(f"the model has no tensor {name!r}")
