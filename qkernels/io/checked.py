"""Tensors and JSON from outside, taken only as they must be."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError

MOST_JSON = 64 << 10  # bytes that describe one weight; real ones have a few hundred


def tensor(tensors: Mapping[str, Tensor], name: str, dtypes: Sequence[torch.dtype], shape: Sequence[int] | None = None) -> Tensor:
    """The tensor `name`, if it is as `fitting` asks; CheckpointError where it is missing."""
    if name not in tensors:
        raise CheckpointError(f"{name} is missing")
    return fitting(name, tensors[name], dtypes, shape)


def fitting(name: str, found: Tensor, dtypes: Sequence[torch.dtype], shape: Sequence[int] | None = None) -> Tensor:
    """A tensor of one of the dtypes and of the shape, where -1 is any extent but 0. Raises CheckpointError that says what it is."""
    if found.dtype not in dtypes:
        raise CheckpointError(f"{name} is {found.dtype}, not {' or '.join(map(str, dtypes))}")
    if shape is not None and (found.dim() != len(shape) or any(e != f if e >= 0 else f == 0 for e, f in zip(shape, found.shape))):
        raise CheckpointError(f"{name} is {list(found.shape)}, not [{', '.join('any' if e < 0 else str(e) for e in shape)}]")
    return found


def reshaped(name: str, numbers: Tensor, shape: Sequence[int]) -> Tensor:
    """Numbers whose extents of 1 may have been left out or put in: [], [N], [N, 1], [N / 128, 1, K / 128, 1]."""
    if [extent for extent in numbers.shape if extent != 1] != [extent for extent in shape if extent != 1]:
        raise CheckpointError(f"{name} is {list(numbers.shape)}, not {list(shape)}")
    return numbers.reshape(tuple(shape))


def text(name: str, found: Tensor, most: int) -> bytes:
    """The bytes of a text that is stored as a tensor."""
    octets = fitting(name, found, (torch.uint8,)).flatten()
    if octets.numel() > most:
        raise CheckpointError(f"{name} has more than {most} bytes, the most that are read")
    return bytes(octets.tolist())


def json_object(said: bytes | str, where: str, most: int = MOST_JSON, finite: bool = True) -> dict[str, Any]:
    """Parse a JSON object: CheckpointError for anything else, for one too large or nested too deeply, and for NaN where all is `finite`."""
    found = _parsed(said, where, most, finite)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is no JSON object")
    return found


def json_names(said: str, where: str) -> list[str]:
    """Parse a list of names, likewise; all the tensors of a model may be in it."""
    return names(_parsed(said, where, 1000 * MOST_JSON, finite=True), where)


def _parsed(said: bytes | str, where: str, most: int, finite: bool) -> Any:
    if len(said) > most:
        raise CheckpointError(f"{where} has more than {most} bytes, the most that are read")
    try:
        return json.loads(said if isinstance(said, str) else said.decode(), parse_constant=_no_number if finite else None)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON: {error}") from error


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number of it")


def names(values: Any, where: str) -> list[str]:
    """A list of strings."""
    if not isinstance(values, list) or not all(isinstance(name, str) for name in values):
        raise CheckpointError(f"{where} is {values!r:.80}, no list of names")
    return values


def extents(values: Any, count: int, where: str) -> tuple[int, ...]:
    """A list of `count` positive integers, of which no one is beyond 2^31."""
    if not isinstance(values, list | tuple) or len(values) != count or not all(type(v) is int and 0 < v < 2**31 for v in values):
        raise CheckpointError(f"{where} is {values!r:.80}, not {count} positive integers")
    return tuple(values)
