"""read and write: any layout, by its name, to and from canonical tensors."""

from __future__ import annotations

import difflib
import importlib
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from qkernels import formats
from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import QuantTensor
from qkernels.io import directory, gguf_blocks, native, shards
from qkernels.io.detect import CheckpointInfo, detect
from qkernels.io.modules import PRE_QUANT_SCALE
from qkernels.io.weights import Value, single

_LEAVES = {"codes": "weight", "scales": "scales", "zeros": "zeros", "tensor_scale": "tensor_scale", "perm": "perm"}  # of native
# those that can be written; "qkernels" is our own
LAYOUTS = ("gptq", "awq", "compressed-tensors", "bitsandbytes", "gguf", "qkernels")


def read(path: str | os.PathLike[str] | CheckpointInfo) -> Iterator[tuple[str, Value]]:
    """Go through a checkpoint: (name, value) for every weight and every other tensor, in its own format, one in memory at a time.

    path     a directory or file, or what `detect` said of it
    yields   "<module>.weight" -> QuantTensor, or QuantStack for experts that are stored as one; other names -> plain tensors, as stored
    Raises   CheckpointError (damaged, or not what it says it is), UnsupportedError (sound, but not read: the value is named)
    """
    info = path if isinstance(path, CheckpointInfo) else detect(path)
    try:
        yield from _read(info)
    except FormatError as error:  # a tensor of a wrong shape or dtype
        raise CheckpointError(f"{info.path}: {error}") from error


def _read(info: CheckpointInfo) -> Iterator[tuple[str, Value]]:
    if info.layout == "gguf":
        yield from _reader("gguf").read(info)
    elif info.layout == "qkernels":
        yield from _read_native(info)
    elif info.layout == "dense":
        yield from shards.Tensors(info.files).items()
    else:
        yield from _reader(info.layout).read(shards.Tensors(info.files), info.settings)


def _read_native(info: CheckpointInfo) -> Iterator[tuple[str, Value]]:
    tensors, layers, _ = native.read(info.path)
    of_layers = {f"{layer}.{leaf}" for layer in layers for leaf in _LEAVES.values()}
    for layer, entry in layers.items():
        if "shared_with" in entry or "rows_of" in entry:
            continue
        held = {field: tensors[f"{layer}.{leaf}"] for field, leaf in _LEAVES.items() if f"{layer}.{leaf}" in tensors}
        q = QuantTensor.from_tensors(formats.get(entry["format"]), tuple(entry["shape"]), held)
        for name in (layer, *(name for name, other in layers.items() if other.get("rows_of") == layer)):
            yield f"{name}.weight", q
    yield from ((name, tensors[name]) for name in tensors if name not in of_layers)


def write(
    items: Iterable[tuple[str, Value]],
    path: str | os.PathLike[str],
    layout: str,
    *,
    settings: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    shard_bytes: int = directory.SHARD_BYTES,
) -> None:
    """Write a checkpoint of a layout, tensor by tensor; it appears whole or not at all.

    items      as `read` yields them
    path       a directory, or a file for "gguf"; nothing may lie there yet
    layout     one of LAYOUTS
    settings   what the checkpoint states about its quantisation, as `CheckpointInfo.settings` of one that was read; None: made anew
    config     of config.json, which gets the settings
    Raises     UnsupportedError for a weight whose numbers the layout cannot hold exactly, FormatError (unknown layout), CheckpointError
    """
    if layout not in LAYOUTS:
        near = difflib.get_close_matches(str(layout), LAYOUTS, n=1, cutoff=0.0)[0]
        raise FormatError(f"unknown layout {layout!r}; {', '.join(LAYOUTS)} can be written; nearest: {near}")
    if layout == "qkernels":
        _write_native(items, path, shard_bytes)
        return
    items = _without_scaled_inputs(items, layout)
    if layout == "gguf":
        _reader("gguf").write(items, Path(path), settings, config)
    else:
        with directory.Writer(path, shard_bytes) as writer:
            stated = _reader(layout).write(items, settings, writer.add)
            writer.config = {**(config or {}), "quantization_config": stated}


def _without_scaled_inputs(items: Iterable[tuple[str, Value]], layout: str) -> Iterator[tuple[str, Value]]:
    for name, value in items:
        if name.endswith(f".{PRE_QUANT_SCALE}"):
            raise UnsupportedError(f"{name} multiplies the input of its layer, which no loader of {layout} would do; qkernels holds it")
        yield name, value


def try_write(items: Iterable[tuple[str, Value]], layout: str, settings: Mapping[str, Any] | None = None) -> None:
    """Raise UnsupportedError as `write` would, without writing anything."""
    if layout == "gguf":
        for item in items:
            for name, value in gguf_blocks.apart(*item):
                _reader("gguf").stored(name, value)
    elif layout == "qkernels":
        for name, value in items:
            if not isinstance(value, Tensor):
                single(name, value, _OURS)
    else:
        _reader(layout).write(items, settings, lambda *_: None)


_OURS = "a qkernels directory"


def _write_native(items: Iterable[tuple[str, Value]], path: str | os.PathLike[str], shard_bytes: int) -> None:
    layers: dict[str, dict[str, Any]] = {}
    with native.Writer(path, layers, {}, shard_bytes) as writer:
        for name, value in items:
            if isinstance(value, Tensor):
                writer.add(name, value)
                continue
            layer, q = name.removesuffix(".weight"), single(name, value, _OURS)
            layers[layer] = {"format": q.format.name, "shape": list(q.shape), "compute": "auto"}
            for field, t in q.tensors().items():
                writer.add(f"{layer}.{_LEAVES[field]}", t)


def _reader(layout: str) -> Any:
    """The module of a layout, imported when it is needed."""
    return importlib.import_module(f"qkernels.io.{layout.replace('-', '_')}")
