"""QuantTensor: a quantised weight in the canonical packing, as plain tensors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import FormatError
from qkernels.formats.format import SCALE_DTYPES, QuantFormat

FIELDS = ("codes", "scales", "zeros", "tensor_scale", "perm")  # the order in which they are saved and listed


@dataclass(frozen=True)
class QuantTensor:
    """A weight W [N, K] as codes, scales and what else its format asks for; checks itself.

    Shapes:
        codes         [N, ceil(K * bits / 8)]    uint8     one bit stream a row (see packing.py); block formats: raw blocks
        scales        [N / group_n, K / group_k] scale type, rounded up; None for block formats
        zeros         like scales                uint8 (zero = "int") or the scales' type (zero = "float" or "min"); else None
        tensor_scale  [1]                        float32, where the format has one
        perm          [K]                        int32: column j of the codes is column perm[j] of W; None = identity
    origin: what a checkpoint says of this weight beyond its numbers (nested scales, how zeros were stored), so that a writer of the same
    layout gives the same bytes; no kernel looks at it, and nothing but the readers and writers passes it on.
    """

    format: QuantFormat
    shape: tuple[int, int]
    codes: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    tensor_scale: Tensor | None = None
    perm: Tensor | None = None
    origin: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __post_init__(self) -> None:
        for name, (shape, dtype) in expected_tensors(self.format, self.shape).items():
            _check(name, getattr(self, name), shape, dtype, self.format)
        if self.perm is not None:
            _check("perm", self.perm, (self.shape[1],), torch.int32, self.format)
        expected = {*expected_tensors(self.format, self.shape), "perm"}
        for name in FIELDS:
            if name not in expected and getattr(self, name) is not None:
                raise FormatError(f"format {self.format.name} has no {name}, but one was given")

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that are there, by field name."""
        return {name: t for name in FIELDS if (t := getattr(self, name)) is not None}

    @classmethod
    def from_tensors(cls, format: QuantFormat, shape: tuple[int, int], tensors: Mapping[str, Tensor]) -> QuantTensor:
        unknown = set(tensors) - set(FIELDS)
        if unknown:
            raise FormatError(f"unknown tensors {sorted(unknown)}; a QuantTensor has {', '.join(FIELDS)}")
        return cls(format, shape, **dict(tensors))  # type: ignore[arg-type]  # fields, as was checked

    def to(self, device: torch.device | str) -> QuantTensor:
        return QuantTensor.from_tensors(self.format, self.shape, {name: t.to(device) for name, t in self.tensors().items()})

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors().values())

    def equal(self, other: QuantTensor) -> bool:
        """Bit for bit the same: format, shape and every tensor."""
        mine, theirs = self.tensors(), other.tensors()
        same = self.format == other.format and self.shape == other.shape and mine.keys() == theirs.keys()
        return same and all(torch.equal(t.view(torch.uint8), theirs[name].view(torch.uint8)) for name, t in mine.items())


@dataclass(frozen=True)
class QuantStack:
    """E weights [N, K] of one format, as the experts of a layer lie in a checkpoint: shape [E, N, K]; `stack[e]` is a view of one.

    tensors   field of QuantTensor -> [E, ...]
    """

    format: QuantFormat
    shape: tuple[int, int, int]
    tensors: Mapping[str, Tensor]

    def __post_init__(self) -> None:
        for name, t in self.tensors.items():
            if t.shape[0] != self.shape[0]:
                raise FormatError(f"a stack of {self.shape[0]} weights needs as many {name}, not {list(t.shape)}")
        self[0]  # checks the rest

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, e: int) -> QuantTensor:
        if not 0 <= e < len(self):
            raise IndexError(e)
        return QuantTensor.from_tensors(self.format, self.shape[1:], {name: t[e] for name, t in self.tensors.items()})

    def __iter__(self) -> Iterator[QuantTensor]:
        return (self[e] for e in range(len(self)))

    @classmethod
    def of(cls, weights: Sequence[QuantTensor]) -> QuantStack:
        """Stack weights of one format and shape."""
        first, fields = weights[0], weights[0].tensors().keys()
        for q in weights:
            if (q.format, q.shape, q.tensors().keys()) != (first.format, first.shape, fields):
                expected, found = (f"{t.format.name} {list(t.shape)} with {', '.join(t.tensors())}" for t in (first, q))
                raise FormatError(f"the weights of a stack are alike: {expected}, not {found}")
        stacked = {name: torch.stack([q.tensors()[name] for q in weights]) for name in fields}
        return cls(first.format, (len(weights), *first.shape), stacked)

    @property
    def nbytes(self) -> int:
        return sum(t.nbytes for t in self.tensors.values())


def expected_tensors(format: QuantFormat, shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Field name -> (shape, dtype) of every tensor that a weight of this shape must have; `perm` is always optional."""
    n, k = shape
    if n < 1 or k < 1:
        raise FormatError(f"a weight is at least 1 x 1, not {n} x {k}")
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {"codes": (format.codes_shape(n, k), torch.uint8)}
    if format.block is not None:
        return expected
    scale_dtype = SCALE_DTYPES[format.scale]
    expected["scales"] = (format.group_shape(n, k), scale_dtype)
    if format.zero != "none":
        expected["zeros"] = (format.group_shape(n, k), torch.uint8 if format.zero == "int" else scale_dtype)
    if format.tensor_scale:
        expected["tensor_scale"] = ((1,), torch.float32)
    return expected


def _check(name: str, t: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype, format: QuantFormat) -> None:
    if t is None:
        raise FormatError(f"format {format.name} needs {name} {list(shape)} {dtype}; none was given")
    if t.dtype != dtype or tuple(t.shape) != shape:
        raise FormatError(f"format {format.name} needs {name} {list(shape)} {dtype}, not {list(t.shape)} {t.dtype}")
