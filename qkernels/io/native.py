"""qkernels' own directory: canonical tensors in safetensors, and what they mean in JSON.

DIR/qkernels.json          {"version": 1, "layers": {name: {"format", "shape", "compute", "dtype" of the dense weight where known, and
                               "shared_with": a first name of the same module or "rows_of": that of a tied head, whose tensors it has}},
                               "tied": {name: name of its tensor}, "sha256": {file: digest}, "digest": of all that}
DIR/model.safetensors      every tensor of the model's state_dict, canonical layout; above 4 GB model-00001-of-0000N.safetensors, …
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

import torch

from qkernels.errors import CheckpointError
from qkernels.io import directory
from qkernels.io.shards import WEIGHTS, Tensors, read_json
from qkernels.progress import track

VERSION = 1
MANIFEST = "qkernels.json"


class Writer(directory.Writer):
    """Write a directory of ours tensor by tensor: `with Writer(path, layers, tied) as writer: writer.add(name, tensor)`.

    Where `path` is a directory of ours already, it is replaced, and what others put there stays; where it is a symbolic link to one, that
    one is replaced. Raises CheckpointError when `path` exists and is no directory of ours, or cannot be written.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        layers: Mapping[str, Mapping[str, Any]],
        tied: Mapping[str, str],
        shard_bytes: int = directory.SHARD_BYTES,
    ) -> None:
        super().__init__(path, shard_bytes)
        self.layers, self.tied = layers, tied

    def _check(self) -> None:
        self._ours()

    def _finish(self) -> None:
        names = self._name_files()
        manifest = {
            "version": VERSION,
            "layers": self.layers,
            "tied": self.tied,
            "sha256": {name: _digest(self.directory / name) for name in names},
        }
        manifest["digest"] = _manifest_digest(manifest)
        (self.directory / MANIFEST).write_text(json.dumps(manifest, indent=1))
        self.directory.chmod(0o755)
        if self.target.exists():
            self._keep_others({*names, MANIFEST})
        self._replace_target()

    def _replace_target(self) -> None:
        """Put the new directory in the old one's place; the old one goes when the new one is there."""
        if not self.target.exists():
            self.directory.rename(self.target)
            return
        aside = Path(tempfile.mkdtemp(prefix=f".{self.target.name}-old-", dir=self.target.parent))
        old = aside / "old"
        try:
            self.target.rename(old)
            self.directory.rename(self.target)
        except BaseException:
            if old.exists():
                old.rename(self.target)
            aside.rmdir()
            raise
        shutil.rmtree(aside, ignore_errors=True)

    def _keep_others(self, new: set[str]) -> None:
        """Put into the new directory what others put into the old one: links to the files, so that the old one stays whole."""
        ours = self._ours()  # again: it may have been made meanwhile
        if lost := sorted(new & ({entry.name for entry in self.target.iterdir()} - ours)):
            raise CheckpointError(f"refusing to replace {', '.join(lost)} in {self.path}, which qkernels did not write: move it away")
        skipped = ours | {entry.name for entry in self.directory.iterdir()}
        shutil.copytree(
            self.target,
            self.directory,
            symlinks=True,
            ignore=lambda directory, names: skipped if Path(directory) == self.target else (),
            copy_function=_link,
            dirs_exist_ok=True,
        )

    def _ours(self) -> set[str]:
        """Names of the files that may be replaced at the target; CheckpointError where it is no directory of ours, nor an empty one."""
        if not self.target.exists():
            if self.path.is_symlink():
                raise CheckpointError(f"{self.path} is a symbolic link to {self.target}, which is not there: make it, or remove the link")
            return set()
        if Path.cwd().is_relative_to(self.target):
            raise CheckpointError(f"{self.path} is or holds the current directory, which cannot be replaced; name another one")
        if self.target.is_dir() and not any(self.target.iterdir()):
            return set()
        if not (self.target / MANIFEST).is_file():
            raise CheckpointError(f"{self.path} exists and is no qkernels directory: refusing to replace it; name a new one")
        try:
            return {MANIFEST, *read_manifest(self.target)["sha256"]}
        except CheckpointError as error:
            raise CheckpointError(f"refusing to replace {self.path}: {error}") from error


def _link(source: str, target: str) -> None:
    """Give a file a second name; copy it where the file system or its owner does not let us."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def read(path: str | os.PathLike[str], progress: bool = False) -> tuple[Tensors, dict[str, dict[str, Any]], dict[str, str]]:
    """Check a directory and return (tensors, each read when asked for; layers; tied). Raises CheckpointError naming what is wrong."""
    source = Path(path)
    manifest = read_manifest(source)
    for name, digest in track(manifest["sha256"].items(), progress, f"checking {path}"):
        if not (source / name).is_file():
            raise CheckpointError(f"{source / name} is missing")
        with directory.typed(f"cannot read {source / name}"):
            found = _digest(source / name)
        if found != digest:
            raise CheckpointError(f"{source / name} is truncated or was edited: its SHA-256 is not the one in {MANIFEST}")
    return Tensors(source / name for name in manifest["sha256"]), manifest["layers"], manifest["tied"]


def read_manifest(source: Path) -> dict[str, Any]:
    """Parse and check qkernels.json."""
    path = source / MANIFEST
    if not path.is_file():
        raise CheckpointError(f"{source} is no directory that qkernels.save wrote: {MANIFEST} is missing")
    manifest = read_json(path)
    if manifest.get("version") != VERSION:
        raise CheckpointError(f"{path} has version {manifest.get('version')!r}; this qkernels reads version {VERSION}")
    layers, digests, tied = manifest.get("layers"), manifest.get("sha256"), manifest.get("tied")
    if not isinstance(layers, dict) or not isinstance(digests, dict) or not isinstance(tied, dict):
        raise CheckpointError(f"{path} lacks its layers, ties or digests")
    if not digests or sorted(digests) != directory.weight_files(len(digests)):
        raise CheckpointError(
            f"{path} lists the files {sorted(digests)}; {WEIGHTS}, or all of model-0000i-of-0000N.safetensors, is possible"
        )
    for name, layer in layers.items():
        if not _is_layer(layer):
            raise CheckpointError(f"{path}: the entry of layer {name!r} is damaged: {layer!r}")
    for name, source_name in tied.items():
        if not isinstance(source_name, str):
            raise CheckpointError(f"{path}: {name!r} is tied to {source_name!r}, no name")
    if manifest.get("digest") != _manifest_digest(manifest):
        raise CheckpointError(f"{path} was edited: its digest is not that of what it says")
    return manifest


def _manifest_digest(manifest: Mapping[str, Any]) -> str:
    said = {key: manifest[key] for key in ("version", "layers", "tied", "sha256")}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()


def _is_layer(entry: Any) -> bool:
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str) or entry.get("compute") not in ("auto", "float", "int8"):
        return False
    shape, dtype = entry.get("shape"), entry.get("dtype", "float32")
    return (
        all(isinstance(entry.get(key, ""), str) for key in ("shared_with", "rows_of"))
        and isinstance(dtype, str)
        and isinstance(getattr(torch, dtype, None), torch.dtype)
        and isinstance(shape, list)
        and len(shape) == 2
        and all(isinstance(extent, int) and extent > 0 for extent in shape)
    )


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
