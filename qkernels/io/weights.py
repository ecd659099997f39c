"""Put a QuantTensor together from what a checkpoint gives, and keep what its numbers do not tell."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

from torch import Tensor

from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import QuantFormat, QuantStack, QuantTensor
from qkernels.formats.format import Code, scale_type
from qkernels.formats.packing import in_order
from qkernels.io import checked

Value = QuantTensor | QuantStack | Tensor
Add = Callable[[str, Tensor], None]


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a name before the message of an error that lacks it; a FormatError becomes a CheckpointError."""
    try:
        yield
    except (CheckpointError, FormatError, UnsupportedError) as error:
        kind = CheckpointError if isinstance(error, FormatError) else type(error)
        raise kind(str(error) if str(error).startswith(name) else f"{name}: {error}") from error


def assemble(
    name: str,
    code: Code,
    shape: Sequence[int],
    group: tuple[int, int],
    codes: Tensor,
    scales: Tensor,
    zeros: Tensor | None = None,
    zero: Literal["int", "float", "min"] = "int",
    **more: Any,
) -> QuantTensor:
    """A QuantTensor of what a checkpoint gives; CheckpointError naming it for whatever does not fit together.

    Shapes:
        scales, zeros   [N / group_n, K / group_k] rounded up; extents of 1 may be left out or put in
    """
    n, k = (int(extent) for extent in shape)
    if n < 1 or k < 1:
        raise CheckpointError(f"{name} is {n} x {k}; a weight is at least 1 x 1")
    with naming(name):
        tensor_scale = more.get("tensor_scale") is not None
        format = QuantFormat(code, group, scale_type(scales.dtype), "none" if zeros is None else zero, tensor_scale)
        scales = _per_group("scales", scales, format, n, k)
        zeros = None if zeros is None else _per_group("zero points", zeros, format, n, k)
        return QuantTensor(format, (n, k), codes, scales, zeros, **more)


def _per_group(what: str, numbers: Tensor, format: QuantFormat, n: int, k: int) -> Tensor:
    group = " x ".join("all" if extent == -1 else str(extent) for extent in format.group)
    described = f"the tensor of {what} of {n} x {k} weights in groups of {group}"
    return in_order(checked.reshaped(described, numbers, format.group_shape(n, k)))


def single(name: str, value: QuantTensor | QuantStack, layout: str) -> QuantTensor:
    """The weight itself; UnsupportedError for a stack, where a layout holds none."""
    if isinstance(value, QuantStack):
        raise UnsupportedError(f"{name} is a stack {list(value.shape)}; {layout} holds single weights")
    return value


def kept(q: QuantTensor, layout: str) -> Mapping[str, Any]:
    """What the reader of a layout left in the weight's `origin` for its writer; that of another layout says nothing here."""
    return q.origin if q.origin.get("layout") == layout else {}
