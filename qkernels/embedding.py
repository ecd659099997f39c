"""QuantEmbedding: `nn.Embedding` whose rows are decoded when they are looked up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import reference
from qkernels.errors import FormatError
from qkernels.formats import QuantTensor
from qkernels.formats.rows import take
from qkernels.formats.tensor import FIELDS
from qkernels.linear import _TENSORS, QuantLinear, _keep_dtype

_AT_ONCE = 128  # rows that are taken out of a kernel's form


class QuantEmbedding(nn.Module):
    """An embedding over a quantised weight, frozen; it holds the canonical tensors and decodes only the rows that are asked for.

    `qkernels.save` and `load` keep it. Tied to a head (`share`), it holds nothing, and takes its rows out of the form of the head's kernel.

    embedding   the module in whose place it comes: its class says what becomes of a row (Gemma scales it)
    q           the weight [num_embeddings, embedding_dim]
    dtype       of what it gives; `.to(dtype)` changes it
    """

    def __init__(self, embedding: nn.Embedding, q: QuantTensor, dtype: torch.dtype) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = q.shape
        self.format = q.format
        # Empty, and first: transformers takes the first parameter of floats for the model's dtype, and scales have one of their own.
        self.like = nn.Parameter(torch.empty(0, dtype=dtype, device=q.codes.device), requires_grad=False)
        self.inner = copy.copy(embedding)
        self.inner._parameters = {"weight": None}
        self.inner.padding_idx = None  # it says which row gets no gradient
        self._hold(q.tensors())

    weight: nn.Parameter | None
    _head: tuple[QuantLinear] | None = None  # in a tuple: it is no part of this module, and moves and is saved where it is one

    def share(self, head: QuantLinear) -> None:
        """Hold nothing more, as `head` has the same weight: rows are taken out of the form that its kernel has of it.

        `state_dict` gives the weight as before; what `load_state_dict` brings is held by this module again.
        Raises FormatError where the head's weight is of another format or shape.
        """
        mine, its = (self.format, (self.num_embeddings, self.embedding_dim)), (head.format, (head.out_features, head.in_features))
        if mine != its:
            raise FormatError(f"the head's weight is {its[0].name} {list(its[1])}, the embedding's {mine[0].name} {list(mine[1])}")
        self._head = (head,)
        self._hold({})

    @property
    def head(self) -> QuantLinear | None:
        """Whose weight this one is."""
        return None if self._head is None else self._head[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def quant_tensor(self) -> QuantTensor:
        if self._head is not None:
            return self._head[0].quant_tensor()
        held = {f: t.detach() for name, f in zip(_TENSORS, FIELDS, strict=True) if (t := getattr(self, name)) is not None}
        return QuantTensor.from_tensors(self.format, (self.num_embeddings, self.embedding_dim), held)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., embedding_dim]"""
        if not ids.numel():
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        rows = self._rows(ids.reshape(-1))
        if type(self.inner) is nn.Embedding:
            return rows.view(*ids.shape, self.embedding_dim)
        numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return torch.func.functional_call(self.inner, {"weight": rows}, (numbers,))

    def _rows(self, ids: Tensor) -> Tensor:
        if self._head is None:
            return reference.decode(take(self.quant_tensor(), ids)).to(self.dtype)
        return torch.cat([reference.decode(self._head[0].rows(some)).to(self.dtype) for some in ids.split(_AT_ONCE)])

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, format={self.format.name}"

    def _hold(self, tensors: dict[str, Tensor]) -> None:
        for name, field in zip(_TENSORS, FIELDS, strict=True):
            t = tensors.get(field)
            self.register_parameter(name, None if t is None else nn.Parameter(t, requires_grad=False))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> QuantEmbedding:
        """`.to()` and its kin: as in QuantLinear, codes and scales keep their dtype."""
        self.inner._apply(fn, recurse)
        self.like = nn.Parameter(fn(self.like.detach()), requires_grad=False)
        if self._head is None:
            self._hold({field: _keep_dtype(fn, t) for field, t in self.quant_tensor().tensors().items()})
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}like"]
        if self._head is not None:
            tensors = self.quant_tensor().tensors()
            destination |= {f"{prefix}{name}": tensors[f] for name, f in zip(_TENSORS, FIELDS, strict=True) if f in tensors}

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        if self._head is not None and f"{prefix}weight" in state_dict:
            self._hold({field: torch.empty_like(t) for field, t in self.quant_tensor().tensors().items()})
            self._head = None
        super()._load_from_state_dict({**state_dict, f"{prefix}like": self.like}, prefix, *others)
