"""What a checkpoint holds, weight by weight, without its numbers: for `qkernels inspect`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

from torch import Tensor

from qkernels import formats, io
from qkernels.errors import UnsupportedError
from qkernels.formats import QuantTensor
from qkernels.io.detect import CheckpointInfo
from qkernels.kernels import registry
from qkernels.kernels.device import Device
from qkernels.kernels.registry import Problem

_LONGEST = 100  # characters of a setting that are shown
# of the hundreds of key-values of a GGUF file: those that say what the model is
_GGUF_KEYS = ("general.architecture", "general.name", "general.file_type", "general.quantization_version")


class Summary:
    """Rows of a table, then their sum; `notes` say what could not be read."""

    def __init__(self, info: CheckpointInfo) -> None:
        self.info, self.notes = info, list[str]()
        self.weights = self.elements = self.nbytes = self.dense = self.dense_bytes = 0

    def head(self) -> Iterator[str]:
        """Layout, and the settings that say something in few words."""
        size = sum(file.stat().st_size for file in self.info.files) / 1e6
        yield f"layout {self.info.layout}, {len(self.info.files)} files, {size:.1f} MB"
        for key, value in self._settings().items():
            if isinstance(value, (str, int, float)) and len(shown := f"{key}: {value}") <= _LONGEST:
                yield f"  {shown}"

    def _settings(self) -> Mapping[str, Any]:
        stated = self.info.settings
        return {key: stated[key] for key in _GGUF_KEYS if key in stated} if self.info.layout == "gguf" else stated

    def rows(self, here: Device) -> Iterator[tuple[str, ...]]:
        """Name, format, shape, bits per weight, MB and kernel of each quantised weight."""
        try:
            for name, shape, p in self._each(here):
                elements, nbytes = math.prod(shape), p.format.nbytes(p.n, p.k) * math.prod(shape[:-2])
                self.weights, self.elements, self.nbytes = self.weights + 1, self.elements + elements, self.nbytes + nbytes
                permuted = ", permuted" if p.perm else ""
                extent = " x ".join(map(str, shape)) + permuted
                yield name, p.format.name, extent, f"{8 * nbytes / elements:.3f}", f"{nbytes / 1e6:.2f}", _kernel(p)
        except UnsupportedError as error:
            self.notes.append(str(error))

    def totals(self) -> Iterator[tuple[str, ...]]:
        """The same columns of all weights, and of what is not quantised."""
        bits = f"{8 * self.nbytes / self.elements:.3f}" if self.elements else ""
        yield f"{self.weights} weights", "", "", bits, f"{self.nbytes / 1e6:.2f}", ""
        if self.dense:
            yield f"{self.dense} tensors that are not quantised", "", "", "", f"{self.dense_bytes / 1e6:.2f}", ""

    def _each(self, here: Device) -> Iterator[tuple[str, tuple[int, ...], Problem]]:
        """Name, shape and problem of what is quantised; what is not is counted. A directory of ours says it in its manifest."""
        if self.info.layout == "qkernels":
            for name, layer in self.info.settings["layers"].items():
                format, (n, k) = formats.get(layer["format"]), layer["shape"]
                yield name, (n, k), Problem(format, n, k, compute=layer["compute"], device=here)
            return
        for name, value in io.read(self.info):
            if isinstance(value, Tensor):
                self.dense, self.dense_bytes = self.dense + 1, self.dense_bytes + value.nbytes
                continue
            *_, n, k = value.shape
            perm = isinstance(value, QuantTensor) and value.perm is not None
            yield name, tuple(value.shape), Problem(value.format, n, k, perm=perm, device=here)


@lru_cache(maxsize=1024)  # models have few kinds of layers
def _kernel(problem: Problem) -> str:
    return registry.plan(problem).kernel.name
