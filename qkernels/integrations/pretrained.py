"""from_pretrained: a checkpoint of any layout as a transformers model whose linears hold the checkpoint's own numbers.

The model is built on the meta device; the readers of `qkernels.io` give the tensors one by one, transformers' rules say what each is
called in the model, and what is quantised becomes a QuantLinear there and then.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from qkernels import formats, io
from qkernels.checkpoint import _fill_buffers
from qkernels.errors import CheckpointError, FormatError
from qkernels.integrations import gguf
from qkernels.integrations.loader import Loader, Value
from qkernels.integrations.transformers import byte_bar, described_by, load_config, model_class
from qkernels.io import CheckpointInfo
from qkernels.kernels import registry
from qkernels.kernels.registry import Compute, Problem

log = logging.getLogger("qkernels")
_WHAT = "loading a model"


def from_pretrained(
    path: str | os.PathLike[str],
    *,
    dtype: torch.dtype | str = "auto",
    device: torch.device | str | None = None,
    compute: Compute = "auto",
    progress: bool = True,
    **model_kwargs: Any,
) -> Any:
    """Load a transformers model whose weights stay in the format that the checkpoint has them in.

    path           a directory with config.json and safetensors, or a .gguf file
    dtype          of all that is not quantised, and so of the activations; "auto" is config.json's, bfloat16 where that says nothing
    device         where the weights go as they are read; None is the CPU
    compute        as in QuantLinear
    model_kwargs   for the model's class, such as attn_implementation
    A quantised embedding decodes the rows that are looked up (QuantEmbedding); where it is tied to the head, out of the form that the
    head's kernel has of the weight, which is held once. Experts become QuantExperts. What is quantised in a place where no
    QuantLinear can be is decoded, and logged. A directory that is not quantised is loaded as it is, with a warning.
    Raises CheckpointError (damaged, or not what config.json describes), UnsupportedError (sound, but not loaded: it is named),
    QKernelsError (no transformers).
    """
    Problem(formats.get("int4"), 1, 1, compute=compute)  # checks compute before any work
    info = io.detect(path)
    if info.layout == "dense":
        log.warning("%s is not quantised: its linears stay dense; qkernels.replace_linear quantises them", path)
    model, items = _skeleton_of(info, dtype, model_kwargs)
    loader = Loader(model, torch.device(device or "cpu"), compute)
    with byte_bar(info.files, progress, f"loading {path}") as advance:
        for name, value in items:
            advance(value.nbytes)
            loader.add(name, value)
            del value  # which may be the last hold on it
        loader.finish()
    _add_generation_config(model, info.path)
    return model


def _skeleton_of(info: CheckpointInfo, dtype: torch.dtype | str, kwargs: dict[str, Any]) -> tuple[Any, Iterable[tuple[str, Value]]]:
    """The model on the meta device, and the tensors under the names that a transformers checkpoint has for them."""
    if info.layout == "gguf":
        config = gguf.load_config(info)
        model = skeleton(config, info.path, dtype, kwargs)
        return model, gguf.items(info, model)
    if not info.path.is_dir():
        raise CheckpointError(f"{info.path} is a file without config.json: name its directory")
    return skeleton(load_config(info.path, _WHAT), info.path / "config.json", dtype, kwargs), io.read(info)


def skeleton(config: Any, path: Path, dtype: torch.dtype | str, kwargs: Mapping[str, Any]) -> Any:
    """The dense model that `config`, read from `path`, describes: on the meta device, but for buffers that no checkpoint holds."""
    for holder in (config, config.get_text_config()):
        if getattr(holder, "quantization_config", None) is not None:
            del holder.quantization_config
    with described_by(path, _WHAT) as transformers:
        architecture = (getattr(config, "architectures", None) or ["AutoModel"])[0]
        build = transformers.AutoModel.from_config if architecture == "AutoModel" else model_class(transformers, architecture)._from_config
        with torch.device("meta"):
            model = build(config, dtype=_dtype(dtype, config), **kwargs)
    _fill_buffers(model)
    return model.eval()


def _dtype(dtype: torch.dtype | str, config: Any) -> torch.dtype:
    if dtype == "auto":
        dtype = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None) or torch.bfloat16
    found = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if found not in registry.DTYPES:
        raise FormatError(f"dtype is {dtype!r}; a QuantLinear takes float32, bfloat16 or float16")
    return found


def _add_generation_config(model: Any, path: Path) -> None:
    if (path / "generation_config.json").is_file():
        with described_by(path / "generation_config.json", _WHAT) as transformers:
            model.generation_config = transformers.GenerationConfig.from_pretrained(path, local_files_only=True)
