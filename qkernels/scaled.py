"""What is scaled channel by channel beside a weight: the input of a QuantLinear, or what an activation gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from qkernels.errors import FormatError
from qkernels.io.modules import PRE_QUANT_SCALE as SCALE  # the name under which it is saved
from qkernels.linear import QuantLinear, _keep_dtype


class ScaledLinear(QuantLinear):
    """y = QuantLinear(x · pre_quant_scale): what ModelOpt's AWQ has divided the columns of the weight by, its input is multiplied by.

    The product is rounded to the dtype of x. `quant_tensor` is the weight without the scale, `to_linear` the one with it.
    Made by `of`, from a QuantLinear.
    """

    pre_quant_scale: nn.Parameter

    @classmethod
    def of(cls, linear: QuantLinear, scale: Tensor) -> ScaledLinear:
        """Make one that holds what `linear` holds, without a copy. Raises FormatError unless scale is [in_features] finite floats."""
        fits = scale.is_floating_point() and tuple(scale.shape) == (linear.in_features,)
        if not fits or not (scale.is_meta or bool(scale.isfinite().all())):
            raise FormatError(f"{SCALE} is {list(scale.shape)} {scale.dtype}; {linear.in_features} finite floats are needed")
        made = cls.__new__(cls)
        made.__dict__ = {**linear.__dict__, "_parameters": dict(linear._parameters)}
        made.register_parameter(SCALE, nn.Parameter(scale, requires_grad=False))
        return made

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features]"""
        if x.dim() and x.size(-1) == self.in_features:  # else QuantLinear says what is wrong
            x = (x * self.pre_quant_scale).to(x.dtype)
        return super().forward(x)

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        linear = super().to_linear(dtype)
        weight = self.dequantize() * self.pre_quant_scale.float()
        linear.weight = nn.Parameter(weight.to(linear.weight.dtype))
        return linear

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScaledLinear:
        super()._apply(fn, recurse)
        self.pre_quant_scale = nn.Parameter(_keep_dtype(fn, self.pre_quant_scale), requires_grad=False)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}{SCALE}"] = self.pre_quant_scale if keep_vars else self.pre_quant_scale.detach()

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *others: Any) -> None:
        name = f"{prefix}{SCALE}"
        super()._load_from_state_dict({key: t for key, t in state_dict.items() if key != name}, prefix, *others)
        holder = nn.Module()  # as QuantLinear does with the bias
        holder.register_parameter(SCALE, self.pre_quant_scale)
        holder._load_from_state_dict({key: t for key, t in state_dict.items() if key == name}, prefix, *others)
        self.pre_quant_scale = holder.pre_quant_scale  # type: ignore[assignment]


class ScaledActivation(nn.Module):
    """An activation whose result is divided by `scales` [features], which AWQ has multiplied into the Linear that follows."""

    def __init__(self, act: nn.Module, scales: Tensor) -> None:
        super().__init__()
        self.act, self.scales = act, nn.Parameter(scales, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.act(x) / self.scales
