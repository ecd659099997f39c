"""Codes nearest to a weight, and the scales that lose least: by the compiled library where it is loaded, else in plain torch.

The codes are those of `reference.encode`, bit for bit, ties included. The library sums each group's squared error in fp32 in an order of
its own that depends on the group's shape alone: the same scales on every instruction set and for every number of threads. Plain torch
sums in another order, so it may settle a near tie between two candidates differently.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from qkernels import reference
from qkernels.formats import Codebook, Int, QuantFormat
from qkernels.formats.packing import pack
from qkernels.reference import code_values, nearest_code, ordered, spread


def best_scales(
    weight: Tensor, format: QuantFormat, scales: Tensor, zeros: Tensor | None = None, tensor_scale: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return for each group which candidate leaves the smallest sum of squared errors (of equal ones the first), and that sum.

    Shapes:
        weight        [N, K]                            any float
        scales        [N / group_n, K / group_k, C]     float32, as the format stores them
        zeros         like scales, or None
        tensor_scale  [1]                               float32
        returns       two of [N / group_n, K / group_k]: index int64, error float32
    """
    if tensor_scale is not None:
        scales = scales * tensor_scale
    zeros = _as_zeros(zeros, scales, format)
    if op := _compiled("cpu_best_scales", weight):
        return op(*_arguments(weight, format, scales, zeros))
    weight = weight.float()
    errors = [_errors(weight, format, scales[..., c], None if zeros is None else zeros[..., c]) for c in range(scales.shape[-1])]
    error, index = torch.stack(errors).nan_to_num_(torch.inf, posinf=torch.inf).min(0)
    return index, error


def codes(weight: Tensor, format: QuantFormat, scales: Tensor, zeros: Tensor | None = None, tensor_scale: Tensor | None = None) -> Tensor:
    """Return the packed codes of `reference.encode`; scales and zeros float32, as the format stores them."""
    if op := _compiled("cpu_encode", weight):
        full = scales if tensor_scale is None else scales * tensor_scale
        shifts = _as_zeros(zeros, scales, format)
        return pack(op(*_arguments(weight, format, full[..., None], None if shifts is None else shifts[..., None])), format.bits)
    return reference.encode(weight, format, scales, zeros, tensor_scale).codes


def _as_zeros(zeros: Tensor | None, scales: Tensor, format: QuantFormat) -> Tensor | None:
    """Zero points that round as minima do: -min / scale, as `reference.encode` has it."""
    if zeros is None or format.zero != "min":
        return zeros
    return -zeros * torch.where(scales == 0, 0.0, 1.0 / scales)


def _compiled(name: str, weight: Tensor) -> Callable[..., Any] | None:
    """The library's op, if it is loaded (`import qkernels` does that) and takes this weight."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return None
    return getattr(torch.ops.qkernels, name, None)


def _arguments(weight: Tensor, format: QuantFormat, scales: Tensor, zeros: Tensor | None) -> tuple[Tensor | int | None, ...]:
    """(weight, scales, zeros, values, thresholds, codes, group_n, group_k, low, high, sign) for the ops."""
    tensors = (weight.contiguous(), scales.contiguous(), None if zeros is None else zeros.contiguous())
    code, extent = format.code, format.group_extent(*weight.shape)
    if isinstance(code, Int):
        return *tensors, None, None, None, *extent, -code.bias, 2**code.bits - 1 - code.bias, 0
    return *tensors, *ordered(code), *extent, 0, 0, 0 if isinstance(code, Codebook) else 2 ** (code.bits - 1)


def _errors(weight: Tensor, format: QuantFormat, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Sum of squared errors of each group, in plain torch."""
    n, k = weight.shape
    group_n, group_k = format.group_extent(n, k)
    full = spread(scales, format, n, k)
    x = weight * torch.where(full == 0, 0.0, 1.0 / full)
    shift = 0.0 if zeros is None else spread(zeros, format, n, k)
    value = code_values(format.code, device=weight.device)[nearest_code(x + shift, format.code).int()] - shift
    error = (value * full - weight).square_()
    error = F.pad(error, (0, -k % group_k, 0, -n % group_n))
    return error.unflatten(1, (-1, group_k)).unflatten(0, (-1, group_n)).sum((1, 3))
