"""What the ops that help to quantise return, for the meta device and torch.compile; quantizers/nearest.py calls them."""

from __future__ import annotations

import torch

from qkernels.kernels.cpu import library

if library.why_missing() is None:

    @torch.library.register_fake("qkernels::cpu_best_scales")
    def _(weight, scales, zeros, values, thresholds, codes, group_n, group_k, low, high, sign):  # type: ignore[no-untyped-def]
        return scales.new_empty(scales.shape[:2], dtype=torch.int64), scales.new_empty(scales.shape[:2])

    @torch.library.register_fake("qkernels::cpu_encode")
    def _(weight, scales, zeros, values, thresholds, codes, group_n, group_k, low, high, sign):  # type: ignore[no-untyped-def]
        return torch.empty_like(weight, dtype=torch.uint8)
