"""bitsandbytes: NF4 weights in groups of 64 with plain (not doubly quantised) fp32 absmax.

For few rows it has a kernel of its own; for more (on an H100 from 17 to 65 on, by the shape) it expands the weight and calls cuBLAS.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from ...base import Contestant, Layer, Prepared

GROUP = 64


def prepare(weight: Tensor, threads: int) -> Prepared:
    """Quantise from float32, so that what `dequantize_4bit` gives back, in the type of its input, is exact."""
    import bitsandbytes as bnb

    codes, state = bnb.functional.quantize_4bit(weight, blocksize=GROUP, compress_statistics=False, quant_type="nf4")

    def make() -> Layer:
        w, s = codes.clone(), copy.deepcopy(state)
        return lambda x: bnb.matmul_4bit(x, w, quant_state=s)

    return Prepared(bnb.functional.dequantize_4bit(codes, state), codes.nbytes + state.absmax.nbytes, make)


CONTESTANTS = (Contestant("bitsandbytes NF4", "peer", "nf4 g64", "bf16", torch.bfloat16, prepare, "bitsandbytes"),)
