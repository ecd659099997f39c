"""The gated half of an MLP, silu(gate(x)) · up(x), in one launch where a kernel has it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qkernels.kernels import registry
from qkernels.linear import QuantLinear


def swiglu(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor:
    """Compute `silu(gate(x)) * up(x)`, what comes before the down projection of Llama and its kin.

    x         [..., K] float32, bfloat16 or float16
    gate, up  layers from K to N: any modules
    returns   [..., N] in the dtype that the layers give

    Two QuantLinear of one format that are packed for a kernel with such an epilogue (`cuda_f16_wN_gemv` and, up to eight rows,
    `cuda_f16_w4_mma`) take one launch, outside of autocast and where no gradient is recorded. It rounds to the dtype once, where the
    formula rounds four times; all else is the same. Raises what the layers raise.
    """
    fused = _fused(x, gate, up)
    return F.silu(gate(x)) * up(x) if fused is None else fused


def _fused(x: Tensor, gate: nn.Module, up: nn.Module) -> Tensor | None:
    """The result in one launch, or None where that cannot be, or is not better."""
    if not (type(gate) is type(up) is QuantLinear) or gate.kernel is None or gate.kernel != up.kernel:
        return None
    alike = gate.format == up.format and (gate.out_features, gate.in_features) == (up.out_features, up.in_features)
    function = registry.get(gate.kernel).swiglu
    if function is None or not alike or x.dim() == 0 or x.shape[-1] != gate.in_features or torch.is_autocast_enabled(x.device.type):
        return None
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, gate.bias, up.bias)):
        return None
    if any(layer._forward_hooks or layer._forward_pre_hooks for layer in (gate, up)):
        return None
    return function(x, gate._packed(), gate.bias, up._packed(), up.bias)
