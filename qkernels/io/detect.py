"""Say what a path holds: which layout, in which files, and what the files state about it. Headers and JSON alone are read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.io import native, shards

GGUF_MAGIC = b"GGUF"
# quant_method of config.json -> the layout, which is a file of this folder (with _ for -)
_METHODS = {
    "gptq": "gptq",
    "awq": "awq",
    "auto-round": "auto-round",
    "compressed-tensors": "compressed-tensors",
    "bitsandbytes": "bitsandbytes",
    "hqq": "hqq",
    "torchao": "torchao",
    "fp8": "fp8",
    "fbgemm_fp8": "fp8",
    "mxfp8": "fp8",
    "mxfp4": "mxfp4",
    "modelopt": "modelopt",
}


@dataclass(frozen=True)
class CheckpointInfo:
    """What lies at a path.

    layout     "gptq", "awq", "auto-round", "compressed-tensors", "bitsandbytes", "hqq", "torchao", "fp8", "mxfp4", "modelopt", "gguf",
               "qkernels", or "dense": not quantised
    files      that hold tensors; the other parts of a split GGUF file among them
    settings   what the files state about the quantisation: `quantization_config` and its kin, the metadata of a GGUF file
    config     config.json, where there is one
    """

    path: Path
    layout: str
    files: tuple[Path, ...]
    settings: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)


def detect(path: str | os.PathLike[str]) -> CheckpointInfo:
    """Look at a directory (config.json and safetensors, or what `qkernels.save` wrote) or at a file (.gguf, .safetensors).

    Raises CheckpointError (nothing there, damaged, contradicts itself), UnsupportedError (a quantisation that is not read, by name).
    """
    path = Path(path)
    if path.is_file():
        return _of_file(path)
    if not path.is_dir():
        hub = f"; a model of the hub is loaded once it lies on a disk: hf download {path} says where" if len(path.parts) == 2 else ""
        raise CheckpointError(f"{path} does not exist{hub}")
    if (path / native.MANIFEST).exists():
        manifest = native.read_manifest(path)
        return CheckpointInfo(path, "qkernels", tuple(path / name for name in manifest["sha256"]), manifest, _config(path))
    gguf = sorted(file for file in path.iterdir() if file.suffix == ".gguf")
    if gguf and not (path / shards.WEIGHTS).exists() and not (path / shards.INDEX).exists():
        raise CheckpointError(f"{path} is a directory; name the file: {gguf[0]}")
    config = _config(path)
    settings = _settings(path, config)
    names = shards.open_directory(path).files
    return CheckpointInfo(path, _layout(path, settings, names), tuple(sorted(set(names.values()))), settings, config)


def _config(path: Path) -> dict[str, Any]:
    return shards.read_json(path / "config.json") if (path / "config.json").exists() else {}


def _of_file(path: Path) -> CheckpointInfo:
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error}") from error
    if magic == GGUF_MAGIC:
        from qkernels.io import gguf  # which imports this file

        return gguf.detect(path)
    if path.suffix == ".safetensors":
        shards.Tensors([path])  # checks it
        return CheckpointInfo(path, "dense", (path,))
    raise CheckpointError(f"{path} is neither GGUF (it begins with {magic!r}) nor safetensors; a directory or such a file can be read")


def _settings(path: Path, config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where the checkpoint states how it was quantised: all the places that are in use, in the order in which their loaders look."""
    for holder in (config, config.get("text_config")):
        if isinstance(holder, Mapping):
            for key in ("quantization_config", "compression_config"):
                if holder.get(key) is not None:
                    if not isinstance(holder[key], Mapping):
                        raise CheckpointError(f"{path / 'config.json'}: {key} is {holder[key]!r:.80}, no JSON object")
                    return holder[key]
    if (path / "hf_quant_config.json").exists():
        found = shards.read_json(path / "hf_quant_config.json")
        return {"quant_method": "modelopt", **found}
    if isinstance(config.get("quantization"), Mapping):
        raise UnsupportedError(f"{path} is quantised by MLX ({config['quantization']!r:.80}), which is not read")
    for name, method in (("quantize_config.json", "gptq"), ("quant_config.json", "awq")):
        if (path / name).exists():
            return {"quant_method": method, **shards.read_json(path / name)}
    return {}


def _layout(path: Path, settings: Mapping[str, Any], names: Iterable[str]) -> str:
    if not settings:
        # hqq itself states nothing: each of its layers says what it is
        return "hqq" if any(name.endswith(".W_q") for name in names) else "dense"
    method = settings.get("quant_method")
    if method is None and (settings.get("load_in_4bit") or settings.get("load_in_8bit")):
        method = "bitsandbytes"
    if method is None:
        raise CheckpointError(f"{path}: its quantization_config names no quant_method")
    if method not in _METHODS:
        raise UnsupportedError(f"{path} is quantised by {method!r}, which is not read; {', '.join(_METHODS)}, GGUF and qkernels are")
    return _METHODS[method]
