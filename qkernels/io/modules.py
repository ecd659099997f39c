"""Tensors of a checkpoint by the module that they belong to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from qkernels.errors import CheckpointError
from qkernels.io import checked

# Last parts of names that are no model weights: they quantise activations and the cache. Readers yield them as plain tensors, as stored.
ACTIVATION_LEAVES = frozenset(
    [f"{of}_{what}" for of in ("input", "output", "q", "k", "v") for what in ("scale", "zero_point", "global_scale")]
    + ["activation_scale", "activation_scale_ub", "input_scale_ub", "kv_scale", "qscale_act"]
)


def is_of_activations(name: str) -> bool:
    """Whether a tensor quantises activations or the cache: "q_proj.input_scale", or "experts.down_proj_activation_scale" of stacks."""
    leaf = name.rpartition(".")[2]
    return leaf in ACTIVATION_LEAVES or leaf.endswith("_proj_activation_scale")


PRE_QUANT_SCALE = "pre_quant_scale"  # last part of a name: [K], by which the input of a layer has to be multiplied, ModelOpt's


class Module:
    """The tensors of one module by leaf ("weight_scale"), each read when it is taken; `done` raises for those that nobody took.

    prefix   what comes before a leaf in the name of its tensor; a module's name and a dot, if nothing else is said
    """

    def __init__(self, tensors: Mapping[str, Tensor], name: str, leaves: Iterable[str], prefix: str | None = None) -> None:
        self.name, self._tensors, self._prefix = name, tensors, f"{name}." if prefix is None else prefix
        self.leaves = [leaf for leaf in leaves if self.full(leaf) in tensors]
        self._left = set(self.leaves)

    @classmethod
    def of(cls, name: str, held: Mapping[str, Tensor]) -> Module:
        """A module of tensors that are there already, by leaf."""
        return cls({f"{name}.{leaf}": t for leaf, t in held.items()}, name, held)

    def full(self, leaf: str) -> str:
        return f"{self._prefix}{leaf}"

    def __contains__(self, leaf: str) -> bool:
        return leaf in self.leaves

    def take(self, leaf: str, *dtypes: torch.dtype, shape: Sequence[int] | None = None) -> Tensor:
        """The tensor, of one of `dtypes` and of the shape (see `checked.fitting`)."""
        if leaf not in self.leaves:
            raise CheckpointError(f"{self.full(leaf)} is missing; {', '.join(sorted(self.leaves)) or 'nothing else'} is there")
        self._left.discard(leaf)
        return checked.tensor(self._tensors, self.full(leaf), dtypes, shape)

    def find(self, leaf: str, *dtypes: torch.dtype, shape: Sequence[int] | None = None) -> Tensor | None:
        """The same, or None where there is none."""
        return self.take(leaf, *dtypes, shape=shape) if leaf in self.leaves else None

    def numbers(self, leaf: str, *dtypes: torch.dtype, shape: Sequence[int]) -> Tensor:
        """The same, of this shape whether extents of 1 are there or not: [] or [1, 1] as [1]."""
        return checked.reshaped(self.full(leaf), self.take(leaf, *dtypes), shape)

    def held(self) -> dict[str, Tensor]:
        """All that is there, unchecked."""
        return {leaf: self._tensors[self.full(leaf)] for leaf in self.leaves}

    def done(self) -> None:
        if self._left:
            raise CheckpointError(f"{self.full(min(self._left))} is there, which the settings of {self.name} leave no use for")


def walk(
    tensors: Mapping[str, Tensor], marks: Collection[str], leaves: Sequence[str], beside: Collection[str] | None = None
) -> Iterator[tuple[str, Module | Tensor]]:
    """Go through a checkpoint in its order: ("<module>.weight", Module) once for each quantised one, and plain tensors by their names.

    marks    leaves of which a quantised module has one
    leaves   of a quantised module
    beside   leaves that it may have besides, which are plain tensors; None: any
    Raises   CheckpointError for a leaf beside them that may change what the numbers mean, and a module without a name
    """
    quantised = {module: leaf for module, _, leaf in (name.rpartition(".") for name in tensors) if leaf in marks}

    def owner_of(name: str) -> str | None:
        module, _, leaf = name.rpartition(".")
        if module not in quantised:
            return None
        if not module:
            raise CheckpointError(f"a tensor is called {quantised['']}, and not <module>.{quantised['']}: nothing says whose it is")
        if leaf not in leaves and beside is not None and leaf not in beside:
            known = ", ".join(dict.fromkeys((*leaves, *beside)))
            raise CheckpointError(f"{name} lies beside {module}.{quantised[module]}; a quantised module has {known}")
        return module if leaf in leaves else None

    for name, quantised_here in by_owner(tensors, owner_of):
        if quantised_here:
            found = Module(tensors, name, leaves)
            yield found.full("weight"), found
        else:
            yield name, dense(name, tensors[name])


def by_owner(names: Iterable[str], owner_of: Callable[[str], str | None]) -> Iterator[tuple[str, bool]]:
    """Go through names in their order: (owner, True) where the first tensor of each owner comes, (name, False) for those of none."""
    seen = set()
    for name in names:
        owner = owner_of(name)
        if owner is None:
            yield name, False
        elif owner not in seen:
            seen.add(owner)
            yield owner, True


def dense(name: str, tensor: Tensor) -> Tensor:
    """The tensor itself; CheckpointError for codes whose scale was not found: cast to a float, they would be off by that scale."""
    # GPT-2's mask is called bias
    integers = tensor.dtype in (torch.int8, torch.uint8) and not name.endswith("bias") and (tensor.dim() > 1 or name.endswith(".weight"))
    if integers or (tensor.is_floating_point() and tensor.dtype.itemsize == 1):
        raise CheckpointError(f"{name} is {tensor.dtype} {list(tensor.shape)}, codes of a quantised weight, and has no scale beside it")
    return tensor
