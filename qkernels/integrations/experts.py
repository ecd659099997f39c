"""Layers that transformers fuses: experts are one QuantLinear each, and a Linear of several weights may be several."""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.errors import CheckpointError, UnsupportedError
from qkernels.formats import QuantTensor
from qkernels.formats.rows import join
from qkernels.kernels.registry import Compute
from qkernels.linear import QuantLinear

Place = tuple[int, int]  # number of an expert, part of its weight
_SAVED = re.compile(r"(.+?)\.(\d+)(?:\.parts\.(\d+))?\.(weight|bias)")  # parameter of the model, number, part of a JoinedLinear, leaf
_LISTED = re.compile(r"(.+\.(?:gate_up|down)_proj)s\.(\d+)\.(weight|bias)")  # Unsloth's gpt-oss: "experts.down_projs.3.weight"
_TAKEN_APART = re.compile(r"(.+)\.(\d+)\.(gate|up|down)_proj\.(weight|bias)")


class JoinedLinear(nn.Module):
    """A Linear whose rows are those of several QuantLinears, one after the other, as their weights cannot lie in one."""

    bias: nn.Parameter | None

    def __init__(self, parts: Iterable[QuantLinear], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)
        self.register_parameter("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.cat([part(x) for part in self.parts], -1)
        return y if self.bias is None else y + self.bias


def linear(parts: Sequence[QuantTensor], bias: nn.Parameter | None, compute: Compute, dtype: torch.dtype) -> nn.Module:
    """The layer of a weight that consists of parts: a QuantLinear where there is one."""
    if len(parts) == 1:
        return QuantLinear.from_quant_tensor(parts[0], bias, compute=compute, dtype=dtype)
    return JoinedLinear((QuantLinear.from_quant_tensor(q, compute=compute, dtype=dtype) for q in parts), bias)


class QuantExperts(nn.Module):
    """Run the experts that got tokens, one after the other; same arguments and result as the module it replaces.

    experts   module of transformers that is decorated with `use_experts_implementation`; it keeps what is between the matmuls
    layers    name of its parameter (gate_up_proj or up_proj, down_proj) -> a Linear for every expert
    Raises    UnsupportedError for a class of experts that says nothing about how its parameters lie
    """

    def __init__(self, experts: Any, layers: dict[str, nn.ModuleList]) -> None:
        super().__init__()
        self.first = "gate_up_proj" if experts.has_gate else "up_proj"
        self.num_experts = len(layers["down_proj"])
        for name, linears in layers.items():
            self.register_module(name, linears)
            for leaf in (name, f"{name}_bias"):
                if leaf in experts._parameters:
                    del experts._parameters[leaf]
        self.inner = experts

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Shapes: hidden_states [T, H], top_k_index [T, k] int64, top_k_weights [T, k] -> [T, H]"""
        tokens, k = top_k_index.shape
        order = torch.argsort(top_k_index.reshape(-1), stable=True)
        counts = torch.bincount(top_k_index.reshape(-1), minlength=self.num_experts).tolist()
        parts = [
            self._expert(e, hidden_states[chosen // k])
            for e, chosen in enumerate(order.split(counts))
            if chosen.numel()
        ]  # fmt: skip
        if not parts:
            return torch.zeros_like(hidden_states)
        weighted = torch.cat(parts) * top_k_weights.reshape(-1)[order, None]
        back = torch.empty_like(order)
        back[order] = torch.arange(order.numel(), device=order.device)
        return weighted[back].view(tokens, k, -1).sum(1).to(hidden_states.dtype)

    def _expert(self, e: int, x: Tensor) -> Tensor:
        x = getattr(self, self.first)[e](x)
        x = self.inner._apply_gate(x) if self.inner.has_gate else self.inner.act_fn(x)
        x = self.down_proj[e](x)  # type: ignore[index,operator]  # a ModuleList
        return self.inner.post_expert_norm(x) if getattr(self.inner, "has_post_expert_norm", False) else x  # not in every version


def check(name: str, module: nn.Module) -> None:
    """Raise UnsupportedError unless `module` is of a kind that QuantExperts can replace."""
    told = all(hasattr(module, flag) for flag in ("has_gate", "has_bias", "is_transposed", "_apply_gate"))
    if not told:
        raise UnsupportedError(f"{name} has quantised experts in a {type(module).__name__}, which does not say how it runs them")


def linears(experts: Any, leaf: str, weights: Iterable[Sequence[QuantTensor]], compute: Compute, dtype: torch.dtype) -> nn.ModuleList:
    """A layer for every expert, of its parts; biases are the skeleton's meta tensors until `replacement` has them."""
    bias = getattr(experts, f"{leaf}_bias", None)
    return nn.ModuleList(linear(parts, None if bias is None else nn.Parameter(bias[e]), compute, dtype) for e, parts in enumerate(weights))


def replacement(experts: Any, layers: dict[str, nn.ModuleList]) -> QuantExperts:
    """Make the QuantExperts of a module whose other parameters are there: what was not quantised becomes dense Linears."""
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    for leaf in names:
        bias = getattr(experts, f"{leaf}_bias", None)
        if leaf not in layers:
            weight = getattr(experts, leaf).detach()
            weight = weight.transpose(1, 2) if experts.is_transposed else weight
            layers[leaf] = nn.ModuleList(_dense(w, bias is not None) for w in weight)
        if bias is not None:
            for layer, b in zip(layers[leaf], bias.detach(), strict=True):
                layer.bias = nn.Parameter(b)  # type: ignore[assignment]
    return QuantExperts(experts, {leaf: layers[leaf] for leaf in names})


def _dense(weight: Tensor, bias: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias, device="meta")
    layer.weight = nn.Parameter(weight)
    return layer


# -- experts that a checkpoint has one by one, and the model in one parameter ------------------------------------------------------


def place(model: nn.Module, own: Container[str], name: str) -> tuple[str, Place] | None:
    """Of what a checkpoint has of one expert, the parameter of all of them, and whose and which part of it this is; None for others.

    Names are those that QuantExperts saves, Unsloth's, and "experts.3.gate_proj.weight", as quantisers call what they took apart: gate
    above up.
    """
    if (m := _SAVED.fullmatch(name)) and (target := m[1] if m[4] == "weight" else f"{m[1]}_bias") in own:
        return target, (int(m[2]), int(m[3] or 0))
    if (m := _LISTED.fullmatch(name)) and (target := m[1] if m[3] == "weight" else f"{m[1]}_bias") in own:
        return target, (int(m[2]), 0)
    if (m := _TAKEN_APART.fullmatch(name)) is None:
        return None
    try:
        module = model.get_submodule(m[1])
    except AttributeError:
        return None
    target = f"{m[1]}.{'down' if m[3] == 'down' else 'gate_up'}_proj{'_bias' if m[4] == 'bias' else ''}"
    laid_out = getattr(module, "is_concatenated", False) and not getattr(module, "is_transposed", True)
    return (target, (int(m[2]), int(m[3] == "up"))) if laid_out and target in own else None


def of_all(name: str, saved: Mapping[Place, Any]) -> Any:
    """The experts' weights, each as its parts, or their biases as one tensor, of all that `place` has found."""
    ordered = sorted(saved.items(), key=lambda item: item[0])
    of_each: dict[int, list[Any]] = {}
    for (e, _), value in ordered:
        of_each.setdefault(e, []).append(value)
    if list(of_each) != list(range(len(of_each))):
        raise CheckpointError(
            f"{name!r}: the checkpoint has its experts {', '.join(map(str, of_each))}; 0 to {len(of_each) - 1} are needed"
        )
    kinds = {(isinstance(value, Tensor), value.shape) for _, value in ordered}
    if len(kinds) == 1 and next(iter(kinds))[0]:
        return torch.stack([torch.cat(parts) for parts in of_each.values()])
    if not all(isinstance(value, QuantTensor) for _, value in ordered):
        raise CheckpointError(f"{name!r}: its experts are of several kinds or shapes")
    return [_joined(parts) for parts in of_each.values()]


def _joined(parts: Sequence[QuantTensor]) -> tuple[QuantTensor, ...]:
    """Parts of a weight as one, where they can lie in one."""
    try:
        return (join(parts),)
    except UnsupportedError:
        return tuple(parts)
