"""bitsandbytes: Linear4bit with NF4 weights in groups of 64 and plain (not doubly quantised) fp32 absmax."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ..base import Contestant, Prepared

GROUP = 64


def prepare(weight: Tensor, threads: int) -> Prepared:
    """Copies of a module that is never called itself: the first call repacks the weights in place on some CPUs."""
    import bitsandbytes as bnb

    n, k = weight.shape
    pristine = bnb.nn.Linear4bit(k, n, bias=False, quant_type="nf4", compute_dtype=torch.bfloat16, device="meta")
    values = weight.bfloat16()
    pristine.weight = bnb.nn.Params4bit(values, requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=GROUP)
    pristine = pristine.to("cpu").eval()
    codes, state = pristine.weight.data, pristine.weight.quant_state
    meaning = bnb.functional.dequantize_4bit(codes, state).float()
    return Prepared(meaning, codes.nbytes + state.absmax.nbytes, lambda: copy.deepcopy(pristine))


CONTESTANTS = (Contestant("bitsandbytes NF4", "peer", "nf4 g64", "bf16", torch.bfloat16, prepare, "bitsandbytes"),)
