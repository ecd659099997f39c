"""What GPTQ's and AWQ's readers and writers have in common: modules with a qweight, which may store their other tensors in several ways."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from qkernels.errors import CheckpointError, FormatError, UnsupportedError
from qkernels.formats import Int, QuantStack, QuantTensor
from qkernels.formats.tensor import same_bits
from qkernels.io import weights
from qkernels.io.modules import Module, walk

FLOATS = (torch.float16, torch.bfloat16, torch.float32)
_IN_BLOCK = re.compile(r".*\.\d+\..*\.weight")  # "model.layers.0.mlp.gate.weight"
Scheme = TypeVar("Scheme")


class Layout(NamedTuple):
    """How modules are told apart.

    leaves   of a quantised one, qweight first: the others may be stored in more than one way
    lone     last parts of the names of modules that have such leaves without being quantised
    """

    name: str
    leaves: tuple[str, ...]
    lone: tuple[str, ...] = ()


def read_modules(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    scheme_of: Callable[[str], Scheme | None],
    unpacked: Callable[[Module, Scheme], QuantTensor],
    remade: Callable[[QuantTensor, Scheme], Mapping[str, Tensor]],
) -> Iterator[tuple[str, QuantTensor | Tensor]]:
    """Yield every weight and every other tensor of a checkpoint.

    scheme_of   how a module is stored, by its path; None: it is not quantised
    remade      the leaves after qweight as a writer makes them; those that are there otherwise go into the weight's origin (None: absent)
    Raises      CheckpointError for a module that has some of these leaves and no qweight, or others beside them
    """
    leaves = layout.leaves
    for name, found in walk(tensors, leaves[:1], leaves, beside=("bias",)):
        if isinstance(found, Tensor):
            module, _, leaf = name.rpartition(".")
            if leaf in leaves and module.rpartition(".")[2] not in layout.lone:
                raise CheckpointError(f"{name} is there, but {module}.{leaves[0]} is missing")
            yield name, found
            continue
        with weights.naming(found.name):
            scheme = scheme_of(found.name)
            if scheme is None:
                raise CheckpointError("qweight is there, but the settings say that this module is not quantised")
            held = found.held()
            q = unpacked(Module.of(found.name, held), scheme)
            made = remade(q, scheme)
            beyond = {leaf: held.get(leaf) for leaf in leaves[1:] if not same_bits(made.get(leaf), held.get(leaf))}
        yield name, replace(q, origin={"layout": layout.name, **beyond} if beyond else {})


def stays_dense(name: str, value: Tensor) -> bool:
    """Whether a plain tensor is the weight of a module in a block, which loaders would take for quantised, were they not told."""
    return value.dim() == 2 and _IN_BLOCK.fullmatch(name) is not None


def write_modules(
    items: Iterable[tuple[str, weights.Value]],
    add: weights.Add,
    stored: Callable[[str, str, QuantTensor | QuantStack], Mapping[str, Tensor]],
) -> list[str]:
    """Add plain tensors as they are and `stored(name, module, weight)` of the weights.

    Returns the modules in blocks that stay dense, and that loaders would take for quantised, were they not told.
    """
    dense = []
    for name, value in items:
        module = name.removesuffix(".weight")
        if isinstance(value, Tensor):
            add(name, value)
            dense += [module] if stays_dense(name, value) else []
            continue
        with weights.naming(module):
            held = stored(name, module, value)
        for leaf, t in held.items():
            add(f"{module}.{leaf}", t)
    return dense


def as_held(made: Mapping[str, Tensor], q: QuantTensor, layout: Layout, read: Callable[[Module], QuantTensor]) -> dict[str, Tensor] | None:
    """What a writer made, with the weight's origin in place; None where that says nothing or is not of these numbers any more."""
    origin = weights.kept(q, layout.name)
    held = {leaf: t for leaf, t in {**made, **origin}.items() if leaf in layout.leaves and t is not None}
    try:
        return held if origin and read(Module.of("it", held)).equal(q) else None
    except (CheckpointError, FormatError, UnsupportedError):
        return None


def plain_weight(
    name: str, value: QuantTensor | QuantStack, bits: Sequence[int], scales: Sequence[str], zeros: Sequence[str]
) -> QuantTensor:
    """The weight, if it has integer codes, groups along K and one level of scales; UnsupportedError says what is in the way."""
    q = weights.single(name, value, "this layout")
    f = q.format
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
    return q
