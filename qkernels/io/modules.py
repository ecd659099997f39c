"""Tensors of a checkpoint by the module that they belong to, and what every reader checks of them."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, FormatError
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.formats.format import Code, scale_type

# Last parts of names that are no model weights: they quantise activations and the cache. Readers yield them as plain tensors, as stored.
ACTIVATION_LEAVES = frozenset(
    [f"{of}_{what}" for of in ("input", "output", "q", "k", "v") for what in ("scale", "zero_point", "global_scale")]
    + ["activation_scale", "activation_scale_ub", "input_scale_ub", "kv_scale", "qscale_act"]
)


class Module:
    """The tensors of one module by leaf ("weight_scale"), each read when it is taken; `done` raises for those that nobody took."""

    def __init__(self, tensors: Mapping[str, Tensor], name: str, leaves: Collection[str]) -> None:
        self.name, self._tensors = name, tensors
        self._left = {leaf for leaf in leaves if self.full(leaf) in tensors}

    def full(self, leaf: str) -> str:
        return f"{self.name}.{leaf}" if self.name else leaf

    def find(self, leaf: str, *dtypes: torch.dtype) -> Tensor | None:
        """The tensor, of one of `dtypes`, or None where there is none."""
        if leaf not in self._left:
            return None
        self._left.discard(leaf)
        return of_dtype(self.full(leaf), self._tensors[self.full(leaf)], *dtypes)

    def take(self, leaf: str, *dtypes: torch.dtype) -> Tensor:
        found = self.find(leaf, *dtypes)
        if found is None:
            raise CheckpointError(f"{self.full(leaf)} is missing; {', '.join(sorted(self._left)) or 'nothing else'} is there")
        return found

    def done(self) -> None:
        if self._left:
            raise CheckpointError(f"{self.full(min(self._left))} is there, which the settings of {self.name} leave no use for")


def walk(tensors: Mapping[str, Tensor], marks: Collection[str], leaves: Collection[str]) -> Iterator[tuple[str, Module | Tensor]]:
    """Go through names in order: ("<module>.weight", Module) once for each that has a leaf of `marks`, and plain tensors by their names."""
    quantised = {name.rpartition(".")[0] for name in tensors if name.rpartition(".")[2] in marks}
    seen = set()
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if module not in quantised or leaf not in leaves:
            yield name, dense(name, tensors[name])
        elif module not in seen:
            seen.add(module)
            found = Module(tensors, module, leaves)
            yield found.full("weight"), found


def dense(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; CheckpointError for codes whose scale was not found: cast to a float, they would be off by that scale."""
    integers = (
        tensor.dtype in (torch.int8, torch.uint8) and tensor.dim() > 1 and not name.endswith("bias")
    )  # a mask of GPT-2's is called so
    if integers or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
        raise CheckpointError(f"{name} is {tensor.dtype} {list(tensor.shape)}, codes of a quantised weight, and has no scale beside it")
    return tensor


def of_dtype(name: str, tensor: Tensor, *dtypes: torch.dtype) -> Tensor:
    if tensor.dtype not in dtypes:
        raise CheckpointError(f"{name} is {tensor.dtype}, not {' or '.join(map(str, dtypes))}")
    return tensor


def assemble(
    name: str,
    code: Code,
    shape: Sequence[int],
    group: tuple[int, int],
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    **more: Any,
) -> QuantTensor:
    """A QuantTensor of what a checkpoint gives; CheckpointError naming it for whatever does not fit together.

    Shapes:
        scales, zeros   [N / group_n, K / group_k] rounded up; extents of 1 may be left out or put in: [], [N], [N / 128, 1, K / 128, 1]
    """
    n, k = (int(extent) for extent in shape)
    if n < 1 or k < 1:
        raise CheckpointError(f"{name} is {n} x {k}; a weight is at least 1 x 1")
    try:
        format = QuantFormat(code, group, scale_type(scales.dtype), "none" if zeros is None else "int", "tensor_scale" in more)
        scales = _per_group(f"the scales of {name}", scales, format, n, k)
        zeros = None if zeros is None else _per_group(f"the zero points of {name}", zeros, format, n, k)
        return QuantTensor(format, (n, k), codes, scales, zeros, **more)
    except FormatError as error:
        raise CheckpointError(f"{name}: {error}") from error


def _per_group(what: str, numbers: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    expected = format.group_shape(n, k)
    if [extent for extent in numbers.shape if extent != 1] != [extent for extent in expected if extent != 1]:
        group = " x ".join("all" if extent == -1 else str(extent) for extent in format.group)
        raise CheckpointError(f"{what} are {list(numbers.shape)}; {list(expected)} belong to {n} x {k} weights in groups of {group}")
    return numbers.reshape(expected)


def expression(pattern: str, where: str) -> re.Pattern[str]:
    """Compile a regular expression of a checkpoint."""
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where} has the expression {pattern!r}, which is none: {error}") from error
