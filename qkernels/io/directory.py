"""Write a directory of safetensors, tensor by tensor: there whole, or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.io.shards import INDEX, WEIGHTS

SHARD_BYTES = 4_000_000_000  # of tensors in one file, unless a single one is larger
Self = TypeVar("Self", bound="Writer")


class Writer:
    """`with Writer(path) as writer: writer.add(name, tensor)`, each name once; `config`, if set meanwhile, becomes config.json.

    Tensors are held until `shard_bytes` of them make a file. All happens in a temporary directory beside `path` (`directory`, for
    files that shall lie there too), renamed at the end: `path` is there whole or, after an exception, as it was.
    Raises CheckpointError when `path` exists and is no empty directory, or cannot be written.
    """

    config: Mapping[str, Any] | None = None

    def __init__(self, path: str | os.PathLike[str], shard_bytes: int = SHARD_BYTES) -> None:
        self.path, self.target, self.shard_bytes = Path(path), Path(os.path.realpath(path)), shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._places: set[int] = set()
        self._nbytes = 0
        self._files: list[tuple[Path, list[str]]] = []

    def __enter__(self: Self) -> Self:
        with typed(f"cannot write {self.path}"):
            self._check()
            self.target.parent.mkdir(parents=True, exist_ok=True)
            self.directory = Path(tempfile.mkdtemp(prefix=f".{self.target.name}-", dir=self.target.parent))
        return self

    def add(self, name: str, tensor: Tensor) -> None:
        if self._shard and self._nbytes + tensor.nbytes > self.shard_bytes:
            self._flush()
        tensor = tensor.contiguous()
        if (place := tensor.data_ptr()) in self._places:
            tensor = tensor.clone()  # safetensors refuses what lies in one place under two names
        self._places.add(place)
        self._shard[name] = tensor
        self._nbytes += tensor.nbytes

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        try:
            with typed(f"cannot write {self.path}, which is as it was"):
                if error is not None:
                    raise error
                if self._shard or not self._files:
                    self._flush()
                self._finish()
        finally:
            shutil.rmtree(self.directory, ignore_errors=True)

    def _check(self) -> None:
        if self.target.exists() and not (self.target.is_dir() and not any(self.target.iterdir())):
            raise CheckpointError(f"{self.path} exists: name a new directory, or an empty one")

    def _flush(self) -> None:
        file = self.directory / f"{len(self._files)}.part"
        save_file(self._shard, str(file), {"format": "pt"})
        file.chmod(0o644)  # safetensors makes it the owner's alone
        self._files.append((file, list(self._shard)))
        self._shard, self._places, self._nbytes = {}, set(), 0

    def _name_files(self) -> list[str]:
        names = weight_files(len(self._files))
        for name, (file, _) in zip(names, self._files):
            file.rename(self.directory / name)
        return names

    def _finish(self) -> None:
        names = self._name_files()
        if len(names) > 1:
            total = sum((self.directory / name).stat().st_size for name in names)
            weight_map = {tensor: name for name, (_, tensors) in zip(names, self._files) for tensor in tensors}
            (self.directory / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1))
        if self.config is not None:
            write_config(self.directory, self.config)
        self.directory.chmod(0o755)
        if self.target.exists():
            self.target.rmdir()  # empty
        self.directory.rename(self.target)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


@contextmanager
def typed(message: str) -> Iterator[None]:
    """Make a CheckpointError of what goes wrong with files."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{message}: {error}") from error


def weight_files(count: int) -> list[str]:
    """Names of `count` weight files, as transformers numbers them."""
    return [WEIGHTS] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
