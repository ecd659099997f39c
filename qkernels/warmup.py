"""Compile ahead: GPU kernels are otherwise compiled at the first call of each shape, some seconds each."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from qkernels.errors import FormatError
from qkernels.linear import QuantLinear


def warmup(model: nn.Module, batch_sizes: Iterable[int], dtype: torch.dtype | None = None) -> int:
    """Run every kind of QuantLinear in `model` once for each number of rows, so that such calls compile nothing later.

    What stays to be compiled: x that is strided or not aligned to 16 bytes, and gradients.

    batch_sizes  rows of x, tokens of a batch together, as they will come: each may want another kernel
    dtype        of x; None: that of the bias, of the dense weight before, or bfloat16
    Returns the number of calls made. Call it before CUDA graphs are captured. Raises FormatError for a batch size below 1.
    """
    rows = sorted(set(batch_sizes))
    if not rows or rows[0] < 1:
        raise FormatError(f"batch_sizes are numbers of rows from 1 on, not {rows or 'nothing'}")
    kinds = {}
    for layer in model.modules():
        if isinstance(layer, QuantLinear) and layer.kernel is not None:
            biased = None if layer.bias is None else layer.bias.dtype
            kinds[layer.format, layer.weight.shape, layer.in_features, layer.kernel, layer.weight.device, biased, layer.dense_dtype] = layer
    with torch.inference_mode():
        for layer in kinds.values():
            kind = dtype or (layer.bias.dtype if layer.bias is not None else layer.dense_dtype or torch.bfloat16)
            for m in rows:
                layer(torch.zeros(m, layer.in_features, dtype=kind, device=layer.weight.device))
    return len(kinds) * len(rows)
