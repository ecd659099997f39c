"""What checkpoints of the GPTQ family have in common: modules of several tensors, codes in words, patterns of module names."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import Int, QuantStack, QuantTensor

LOG = logging.getLogger("qkernels")
Value = QuantTensor | QuantStack | Tensor
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_IN_BLOCK = re.compile(r".*\.\d+\..*\.weight")  # "model.layers.0.mlp.gate.weight"
_MOST_PATTERN = 1000  # characters of a regular expression from outside


def walk(tensors: Mapping[str, Tensor], leaves: Sequence[str], lone: Sequence[str] = ()) -> Iterator[tuple[str, dict[str, Tensor] | None]]:
    """Go through a checkpoint in its order, the tensors of a quantised module together, where the first of them comes.

    leaves    of a quantised module, which is one with a qweight; a bias may lie beside them
    lone      last parts of the names of modules that have such leaves without being quantised
    yields    (module, its tensors by leaf), or (name, None) for every other tensor
    Raises    CheckpointError for a module that has some of these leaves and no qweight, or others beside them
    """
    held: dict[str, list[str]] = {}
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        held.setdefault(module, []).append(leaf)
    done = set()
    for name in tensors:
        module, _, leaf = name.rpartition(".")
        if "qweight" not in held[module]:
            if leaf in leaves and module.rpartition(".")[2] not in lone:
                raise CheckpointError(f"{name} is there, but {module}.qweight is missing")
            yield name, None
        elif not module:
            raise CheckpointError("a tensor is called qweight, and not <module>.qweight: nothing says whose it is")
        elif surplus := next((other for other in held[module] if other not in (*leaves, "bias")), None):
            raise CheckpointError(f"{module}.{surplus} lies beside {module}.qweight; a quantised module has {', '.join(leaves)} and bias")
        elif leaf == "bias":
            yield name, None
        elif module not in done:
            done.add(module)
            yield module, {other: tensors[f"{module}.{other}"] for other in held[module] if other != "bias"}


@contextmanager
def naming(module: str) -> Iterator[None]:
    """Put the module's name before the message of an error."""
    try:
        yield
    except UnsupportedError as error:
        raise UnsupportedError(f"{module}: {error}") from error
    except (CheckpointError, FormatError) as error:
        raise CheckpointError(f"{module}: {error}") from error


def check(held: Mapping[str, Tensor], leaf: str, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> Tensor:
    """A tensor of a module, after a look at its shape (-1: any extent) and dtype."""
    if leaf not in held:
        raise CheckpointError(f"{leaf} is missing")
    t = held[leaf]
    fits = t.dim() == len(shape) and all(want in (-1, extent) for want, extent in zip(shape, t.shape))
    if not fits or t.dtype not in dtypes:
        wanted = [extent if extent != -1 else "any" for extent in shape]
        raise CheckpointError(f"{leaf} is {list(t.shape)} {t.dtype}, not {wanted} {' or '.join(map(str, dtypes))}")
    return t


def in_order(t: Tensor) -> Tensor:
    """Lay a tensor out row by row; `contiguous()` leaves axes of one element with strides over which no wider or narrower view is made."""
    return t.clone(memory_format=torch.contiguous_format)


def to_stream(words: Tensor, bits: int, count: int) -> Tensor:
    """Little-endian words that run along the last axis, as the canonical bit stream of `count` codes.

    Shapes:
        words      [..., ceil(count * bits / 32)]    int32
        returns    [..., ceil(count * bits / 8)]     uint8
    """
    return in_order(words).view(torch.uint8)[..., : -(-count * bits // 8)].contiguous()


def to_words(stream: Tensor) -> Tensor:
    """Invert `to_stream`; what fills the last word is 0."""
    return in_order(F.pad(stream, (0, -stream.shape[-1] % 4))).view(torch.int32)


def same(a: Tensor | None, b: Tensor | None) -> bool:
    """Bit for bit the same, dtype and shape too."""
    if a is None or b is None:
        return a is b
    same_kind = a.dtype == b.dtype and a.shape == b.shape
    return same_kind and torch.equal(in_order(a).view(torch.uint8), in_order(b).view(torch.uint8))


def beyond(made: Mapping[str, Tensor], held: Mapping[str, Tensor], leaves: Sequence[str]) -> dict[str, Tensor | None]:
    """The origin of a weight: those leaves that were held otherwise than a writer makes them; None is absent."""
    return {leaf: held.get(leaf) for leaf in leaves if not same(made.get(leaf), held.get(leaf))}


def as_held(
    made: Mapping[str, Tensor], q: QuantTensor, leaves: Sequence[str], read: Callable[[Mapping[str, Tensor]], QuantTensor]
) -> dict[str, Tensor] | None:
    """What a writer made, with the weight's origin in place; None where that says nothing or is not of these numbers any more."""
    kept = {leaf: q.origin[leaf] for leaf in leaves if leaf in q.origin}
    held = {leaf: t for leaf, t in {**made, **kept}.items() if t is not None}
    try:
        return held if kept and read(held).equal(q) else None
    except (CheckpointError, FormatError, UnsupportedError):
        return None


def compiled(pattern: Any, where: str) -> re.Pattern[str]:
    """A regular expression of a checkpoint."""
    try:
        if len(pattern) > _MOST_PATTERN:
            raise CheckpointError(f"{where}: a pattern of {len(pattern)} characters; {_MOST_PATTERN} at most are read: {pattern:.40}…")
        return re.compile(pattern)
    except (re.error, TypeError, RecursionError, OverflowError) as error:
        raise CheckpointError(f"{where}: {pattern!r:.80} is no regular expression: {error}") from error


def stays_dense(name: str, value: Value) -> bool:
    """Whether a tensor is the weight of a module in a block that loaders would take for quantised, were they not told."""
    return isinstance(value, Tensor) and value.dim() == 2 and _IN_BLOCK.fullmatch(name) is not None


def plain_weight(name: str, value: Value, bits: Sequence[int], scales: Sequence[str], zeros: Sequence[str]) -> QuantTensor:
    """The weight, if it has integer codes, groups along K and one level of scales; UnsupportedError says what is in the way."""
    if isinstance(value, QuantStack):
        raise UnsupportedError(f"{name} is a stack {list(value.shape)}; this layout holds single layers")
    assert isinstance(value, QuantTensor)
    f = value.format
    reasons = (
        (f.block is not None or not isinstance(f.code, Int), f"codes of {f.name}; integers are held"),
        (f.bits not in bits, f"{f.bits} bits; {', '.join(map(str, bits))} are held"),
        (f.group[0] != 1, f"groups of {f.group[0]} rows; each row has its own scales here"),
        (f.zero not in zeros, f"zero points of type {f.zero!r}; {', '.join(map(repr, zeros))} are held"),
        (f.tensor_scale, "a scale for the whole tensor"),
        (f.scale not in scales, f"{f.scale} scales; {', '.join(scales)} are held"),
        (not name.endswith(".weight"), "a name that does not end in .weight"),
    )
    for hinders, what in reasons:
        if hinders:
            raise UnsupportedError(f"{name} has {what}")
    return value
