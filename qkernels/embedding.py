"""QuantEmbedding: `nn.Embedding` whose rows are decoded when they are looked up."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qkernels import reference
from qkernels.formats import QuantTensor
from qkernels.formats.rows import take
from qkernels.formats.tensor import FIELDS
from qkernels.linear import _TENSORS, _keep_dtype


class QuantEmbedding(nn.Module):
    """An embedding over a quantised weight, frozen; it holds the canonical tensors and decodes only the rows that are asked for.

    `qkernels.save` and `load` keep it.

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

    weight: nn.Parameter

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    def quant_tensor(self) -> QuantTensor:
        held = {f: t.detach() for name, f in zip(_TENSORS, FIELDS, strict=True) if (t := getattr(self, name)) is not None}
        return QuantTensor.from_tensors(self.format, (self.num_embeddings, self.embedding_dim), held)

    def forward(self, ids: Tensor) -> Tensor:
        """ids [...] integers -> [..., embedding_dim]"""
        if not ids.numel():
            return torch.empty(*ids.shape, self.embedding_dim, dtype=self.dtype, device=ids.device)
        rows = reference.decode(take(self.quant_tensor(), ids.reshape(-1))).to(self.dtype)
        if type(self.inner) is nn.Embedding:
            return rows.view(*ids.shape, self.embedding_dim)
        numbers = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        return torch.func.functional_call(self.inner, {"weight": rows}, (numbers,))

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
        self._hold({field: _keep_dtype(fn, t) for field, t in self.quant_tensor().tensors().items()})
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}like"]

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *others: Any) -> None:
        super()._load_from_state_dict({**state_dict, f"{prefix}like": self.like}, prefix, *others)
