"""The compiled CUDA library: load it once, or say why it is not there."""

from __future__ import annotations

import functools

from qkernels.kernels import compiled


@functools.lru_cache(maxsize=1)
def why_missing() -> str | None:
    """Load the library, for which no GPU and no driver is needed; None when it is there, else the reason."""
    return compiled.load("_CUDA", "cuda_reason")
