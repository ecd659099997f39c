"""transformers' rules that fuse, split or reorder the tensors of a checkpoint, carried out on quantised ones.

Such a rule only moves rows, so it is asked where they go: it runs on tensors of row numbers, and the rows of codes, scales and zeros
follow what comes out. Weights that cannot lie in one (of two formats, or with second scales that differ) stay parts, below each other.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantStack, QuantTensor
from qkernels.formats.rows import join, take

# Operations that move rows (or, Transpose, say that the model holds a weight the other way round) and do nothing else.
_MOVES = (
    "MergeModulelist", "SplitModulelist", "Concatenate", "Chunk", "Split", "Transpose", "Interleave", "PermuteForRope",
    "ErnieFuseAndSplitTextVisionExperts",
)  # fmt: skip

Piece = tuple[str, str, Any]  # name in the checkpoint, the rule's pattern for it, value
Parts = tuple[QuantTensor, ...]  # a weight, whose rows are those of the first, then those of the second, …
MOST_PARTS = 8  # a layer of more would be slow


def convert(converter: Any, name: str, pieces: Sequence[Piece], model: Any) -> Mapping[str, Tensor | list[Parts]]:
    """Apply a rule to all that it asks for: name in the model -> a plain tensor, or the weights that lie in the model's one parameter.

    Raises UnsupportedError (a rule that does more than move rows, or weights that cannot lie in one), CheckpointError (the rule failed).
    """
    keys = ", ".join(key for key, _, _ in pieces[:4])
    if all(isinstance(value, Tensor) for _, _, value in pieces):
        return _run(converter, name, pieces, model, keys)
    if any(isinstance(value, Tensor) for _, _, value in pieces):
        raise UnsupportedError(f"{name!r} is made from {keys}, …, of which some are quantised and some are not")
    for operation in converter.operations:
        if type(operation).__name__ not in _MOVES:
            raise UnsupportedError(f"{name!r} is made from {keys} by {operation!r}, which is not known to move rows only")
    weights = [q for _, _, value in pieces for q in (list(value) if isinstance(value, QuantStack) else [value])]
    starts = list(accumulate((q.shape[0] for q in weights), initial=0))
    numbers, start = [], 0
    for key, pattern, value in pieces:
        count = torch.Size(value.shape[:-1]).numel()
        row = torch.arange(start, start + count).view(*value.shape[:-1], 1)
        numbers.append((key, pattern, torch.cat((2 * row, 2 * row + 1), -1)))  # two columns show what the rule does along K
        start += count
    moved = _run(converter, name, numbers, model, keys)
    try:
        return {target: [_gather(weights, starts, rows) for rows in _rows(t, name, converter)] for target, t in moved.items()}
    except UnsupportedError as error:
        raise UnsupportedError(f"{name!r} is made from {keys}: {error}") from None


def _run(converter: Any, name: str, pieces: Sequence[Piece], model: Any, keys: str) -> dict[str, Tensor]:
    converter = copy.deepcopy(converter)
    for key, pattern, value in pieces:
        converter.add_tensor(name, key, pattern, partial(lambda t: t, value))
    try:
        converted = converter.convert(name, model=model, config=model.config)
    except (RuntimeError, ValueError, LookupError) as error:
        raise CheckpointError(f"{name!r} cannot be made from {keys}: {error}") from error
    return {target: t[0] if isinstance(t, list) else t for target, t in converted.items()}


def _rows(t: Tensor, name: str, converter: Any) -> Tensor:
    """Of the row numbers that a rule gave, [N', 2] or [E, N', 2], the rows of each weight: [E, N']."""
    for moved in (t, t.transpose(-1, -2)) if t.dim() in (2, 3) else ():
        if moved.shape[-1] == 2 and torch.equal(moved[..., 0] + 1, moved[..., 1]) and not bool((moved[..., 0] % 2).any()):
            rows = moved[..., 0] // 2
            return rows if rows.dim() == 2 else rows[None]
    raise UnsupportedError(f"{converter.operations} takes rows apart")


def _gather(weights: Sequence[QuantTensor], starts: Sequence[int], rows: Tensor) -> Parts:
    """The weight whose rows are those of `weights`, numbered through."""
    owners = torch.bucketize(rows, torch.tensor(starts[1:]), right=True)
    runs, counts = torch.unique_consecutive(owners, return_counts=True)
    parts = [take(weights[i], part - starts[i]) for i, part in zip(runs.tolist(), rows.split(counts.tolist()))]
    try:
        return (join(parts),)
    except UnsupportedError:
        if len(parts) > MOST_PARTS:
            raise
        return tuple(parts)
