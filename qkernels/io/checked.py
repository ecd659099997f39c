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
    """The tensor `name`, of one of the dtypes and of the shape; -1 in it is any extent. Raises CheckpointError that says what it is."""
    if name not in tensors:
        raise CheckpointError(f"{name} is missing")
    found = tensors[name]
    if found.dtype not in dtypes:
        raise CheckpointError(f"{name} is {found.dtype}; {', '.join(map(str, dtypes))} is possible")
    if shape is not None and (found.dim() != len(shape) or any(e not in (-1, f) for e, f in zip(shape, found.shape))):
        raise CheckpointError(f"{name} is {list(found.shape)}; {list(shape)} is needed")
    return found


def json_object(text: bytes | str, where: str) -> dict[str, Any]:
    """Parse what describes one weight: CheckpointError for anything but a JSON object, for one too large or nested too deeply."""
    found = _parsed(text, where, MOST_JSON)
    if not isinstance(found, dict):
        raise CheckpointError(f"{where} is no JSON object")
    return found


def json_names(text: str, where: str) -> list[str]:
    """Parse a list of names, likewise; all the tensors of a model may be in it."""
    found = _parsed(text, where, 1000 * MOST_JSON)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise CheckpointError(f"{where} is no JSON list of names")
    return found


def _parsed(text: bytes | str, where: str, most: int) -> Any:
    if len(text) > most:
        raise CheckpointError(f"{where} has {len(text)} bytes; {most} at most are read")
    try:
        return json.loads(text if isinstance(text, str) else text.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{where} is no JSON: {error}") from error


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number of it")


def extents(values: Any, count: int, where: str) -> tuple[int, ...]:
    """A list of `count` positive integers, of which no one is beyond 2^31."""
    if not isinstance(values, list | tuple) or len(values) != count or not all(type(v) is int and 0 < v < 2**31 for v in values):
        raise CheckpointError(f"{where} is {values!r:.80}, not {count} positive integers")
    return tuple(values)
