"""A model's safetensors, in one file or many, as one mapping whose tensors are read when they are asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.io import checked

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
MOST_JSON = 64 << 20  # bytes: an index of the largest models has 20 MB
_PICKLED = (".bin", ".pt", ".pth", ".h5", ".msgpack")


class Tensors(Mapping[str, Tensor]):
    """Tensors of some safetensors files by name; `files` and `shapes` say where each lies and how large it is, from the headers alone.

    metadata   what the headers state besides; where several files state a key, the last one's holds

    Every access opens the file anew (1 ms where it holds a thousand tensors): its mapped pages then leave together with the tensor,
    while an open file would gather all that was ever read. Raises CheckpointError for an unreadable file or a name in two files.
    """

    def __init__(self, files: Iterable[Path]) -> None:
        self.files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.metadata: dict[str, str] = {}
        for path in files:
            with _opened(path) as file:
                self.metadata.update(file.metadata() or {})
                for name in file.keys():  # noqa: SIM118  # no mapping
                    if name in self.files:
                        raise CheckpointError(f"tensor {name!r} lies in two files: {self.files[name]} and {path}")
                    self.files[name], self.shapes[name] = path, tuple(file.get_slice(name).get_shape())

    def __getitem__(self, name: str) -> Tensor:
        with _opened(self.files[name]) as file:
            return file.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)


def open_directory(directory: Path) -> Tensors:
    """Open model.safetensors, or else the files that model.safetensors.index.json names; the index is not trusted.

    One file or index of another name is taken where it is the only one: AutoGPTQ saves gptq_model-4bit-128g.safetensors.

    Raises CheckpointError naming what is missing, truncated, outside the directory, or not where the index says it is.
    """
    if (directory / WEIGHTS).is_file():
        return Tensors([directory / WEIGHTS])
    index = directory / INDEX
    if not index.is_file() and len(others := list(directory.glob("*.safetensors.index.json"))) == 1:
        index = others[0]
    if not index.is_file():
        alone = list(directory.glob("*.safetensors"))
        if len(alone) == 1 and "-of-" not in alone[0].name:  # no shard of several
            return Tensors(alone)
        pickled = sorted(p.name for p in directory.iterdir() if p.suffix in _PICKLED)
        advice = f", only {', '.join(pickled)}: load it in transformers and save_pretrained() writes safetensors" if pickled else ""
        raise CheckpointError(f"{directory} holds neither {WEIGHTS} nor {INDEX}{advice}")
    weight_map = _weight_map(index)
    tensors = Tensors(directory / file for file in sorted(set(weight_map.values())))
    for name, file in weight_map.items():
        if tensors.files.get(name) != directory / file:
            raise CheckpointError(f"{index} says that {name!r} lies in {file}, where it is not")
    return tensors


def _weight_map(index: Path) -> dict[str, str]:
    found = read_json(index)
    weight_map = found.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map of tensors to files")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file or not file.endswith(".safetensors"):
            raise CheckpointError(f"{index} names the file {file!r}; a .safetensors file of the same directory is possible")
    return weight_map


def read_json(path: Path) -> dict[str, Any]:
    """Parse a file of a JSON object: CheckpointError for anything else. Infinity is read, which Python writes and some models state."""
    try:
        with path.open("rb") as file:
            said = file.read(MOST_JSON + 1)
    except OSError as error:
        raise CheckpointError(f"{path} is unreadable: {error}") from error
    return checked.json_object(said, str(path), MOST_JSON, finite=False)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is missing, truncated or no safetensors file: {error}") from error
