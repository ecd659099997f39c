"""Quantisers: functions (weight, format) -> QuantTensor, by name."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from torch import Tensor

from qkernels.errors import FormatError
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.quantizers.rtn import rtn

Quantizer = Callable[[Tensor, QuantFormat], QuantTensor]

QUANTIZERS: dict[str, Quantizer] = {"rtn": rtn, "absmax": partial(rtn, clip_search=False)}


def get(name: str | Quantizer) -> Quantizer:
    """Return the quantiser called `name` ("rtn": with clip search, "absmax": without); a function is returned as it is."""
    if callable(name):
        return name
    if name not in QUANTIZERS:
        near = difflib.get_close_matches(str(name), QUANTIZERS, n=1, cutoff=0.0)
        raise FormatError(f"unknown quantizer {name!r}; known: {', '.join(QUANTIZERS)}; nearest: {', '.join(near)}")
    return QUANTIZERS[name]


__all__ = ["QUANTIZERS", "Quantizer", "get", "rtn"]
