"""qkernels' own directory: canonical tensors in safetensors, and what they mean in JSON.

DIR/qkernels.json          {"version": 1, "layers": {name: {"format", "shape", "compute"}}, "tied": {name: name of its tensor},
                               "sha256": {file: digest}}
DIR/model.safetensors      every tensor of the model's state_dict, canonical layout
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qkernels.errors import CheckpointError

VERSION = 1
MANIFEST, WEIGHTS = "qkernels.json", "model.safetensors"


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]], tied: Mapping[str, str]
) -> None:
    """Write a directory: into a temporary one beside it first, then renamed, so that it is there whole or not at all."""
    target = Path(path)
    if target.exists() and (not target.is_dir() or (any(target.iterdir()) and not (target / MANIFEST).exists())):
        raise CheckpointError(f"{target} exists and is no qkernels directory: refusing to replace it")
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        save_file({name: t.contiguous() for name, t in tensors.items()}, str(temporary / WEIGHTS), {"format": "pt"})
        manifest = {"version": VERSION, "layers": layers, "tied": tied, "sha256": {WEIGHTS: _digest(temporary / WEIGHTS)}}
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=1))
        temporary.chmod(0o755)
        if target.exists():
            shutil.rmtree(target)
        temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, str]]:
    """Read and check a directory; return (tensors, layers, tied). Raises CheckpointError naming what is wrong."""
    source = Path(path)
    manifest = read_manifest(source)
    for name, digest in manifest["sha256"].items():
        if name != WEIGHTS:
            raise CheckpointError(f"{source / MANIFEST} lists the unknown file {name!r}")
        if not (source / name).is_file():
            raise CheckpointError(f"{source / name} is missing")
        if _digest(source / name) != digest:
            raise CheckpointError(f"{source / name} is truncated or was edited: its SHA-256 is not the one in {MANIFEST}")
    try:
        with safe_open(str(source / WEIGHTS), framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, manifest["layers"], manifest["tied"]  # noqa: SIM118  # no mapping
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{source / WEIGHTS} is not readable: {error}") from error


def read_manifest(source: Path) -> dict[str, Any]:
    """Parse and check qkernels.json."""
    path = source / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{source} is no directory that qkernels.save wrote: {MANIFEST} is missing")
    try:
        manifest = json.loads(path.read_text())
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(manifest, dict) or manifest.get("version") != VERSION:
        version = manifest.get("version") if isinstance(manifest, dict) else None
        raise CheckpointError(f"{path} has version {version!r}; this qkernels reads version {VERSION}")
    layers, digests = manifest.get("layers"), manifest.get("sha256")
    if (
        not isinstance(layers, dict)
        or not isinstance(digests, dict)
        or WEIGHTS not in digests
        or not isinstance(manifest.get("tied"), dict)
    ):
        raise CheckpointError(f"{path} lacks its layers, ties or digests")
    for name, layer in layers.items():
        if not isinstance(layer, dict) or not isinstance(layer.get("format"), str) or layer.get("compute") not in ("auto", "float", "int8"):
            raise CheckpointError(f"{path}: the entry of layer {name!r} is damaged: {layer!r}")
    return manifest


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else hashlib.sha256(file.read()).hexdigest()
        )
