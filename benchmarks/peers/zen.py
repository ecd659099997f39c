"""zentorch (AMD): dynamic W8A8 and weight-only int4.

The library keeps packed copies of int8 weights by their address, so a process that measures it grows by the size of the weights.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..base import Contestant, Prepared, expand, groupwise, nbytes_of

GROUP = 128


def w8a8(weight: Tensor, threads: int) -> Prepared:
    """zentorch_dynamic_qlinear: int8 weights with one scale per row, activations quantised per row within the call."""
    import zentorch  # noqa: F401  # registers the ops

    codes, scales = groupwise(weight, weight.shape[1], 127)

    def make():
        w, s = codes.clone(), scales.view(-1).clone()
        return lambda x: torch.ops.zentorch.zentorch_dynamic_qlinear(x, w, s)

    return Prepared(expand(codes, scales), nbytes_of(codes, scales), make)


def w4a16(weight: Tensor, threads: int) -> Prepared:
    """zentorch_woq_linear: symmetric int4 in groups of 128, bf16 activations and arithmetic."""
    import zentorch  # noqa: F401

    codes, scales = groupwise(weight, GROUP, 7)
    scales = scales.bfloat16()
    packed = torch.ops.zentorch.zentorch_woq_repack_weight(codes)
    by_group = scales.T.contiguous()  # [K/G, N]

    def make():
        w, s = packed.clone().T, by_group.clone()
        return lambda x: torch.ops.zentorch.zentorch_woq_linear(x, w, s, None)

    return Prepared(expand(codes, scales), nbytes_of(packed, by_group), make)


CONTESTANTS = (
    Contestant("zentorch W8A8", "peer", "int8", "int8", torch.bfloat16, w8a8, "zentorch"),
    Contestant("zentorch W4A16", "peer", "int4 g128", "bf16", torch.bfloat16, w4a16, "zentorch"),
)
