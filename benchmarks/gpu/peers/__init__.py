"""What qkernels is measured against on a GPU: torch's own kernels, and other libraries, one file each.

Every contestant takes a float32 CUDA weight and gives layers from bf16 [M, K] to bf16 [M, N] that can be captured in a CUDA graph once
they have been called at that M: first calls compile, tune and load. Nothing here touches CUDA or imports a library before `prepare`.
"""

from __future__ import annotations

import importlib.util

import torch

from ...base import Contestant
from . import aten, bnb, gem, hum

TORCH: tuple[Contestant, ...] = aten.CONTESTANTS
OTHERS: tuple[Contestant, ...] = (*aten.PEERS, *bnb.CONTESTANTS, *gem.CONTESTANTS, *hum.CONTESTANTS)


def why_not(contestant: Contestant) -> str | None:
    """Say why a contestant cannot be measured on this machine, or None. Wrong results and crashes show only when it runs."""
    if contestant.package and importlib.util.find_spec(contestant.package) is None:
        return f"not installed (pip install {contestant.distribution or contestant.package})"
    if not torch.cuda.is_available():
        return "no CUDA device"
    return None
