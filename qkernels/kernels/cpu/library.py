"""The compiled library: load it once, or say why it is not there."""

from __future__ import annotations

import functools

import torch

from qkernels import config
from qkernels.errors import FormatError
from qkernels.kernels import compiled


@functools.lru_cache(maxsize=1)
def why_missing() -> str | None:
    """Load the library; None when it is there, else the reason."""
    if reason := compiled.load("_C", "reason"):
        return reason
    try:
        torch.ops.qkernels.cpu_set_level(config.forced_isa() or "")
    except ValueError as error:
        raise FormatError(str(error)) from None
    except RuntimeError as error:
        return f"the compiled library does not load: {str(error).splitlines()[0]}"
    return None


@functools.lru_cache(maxsize=1)
def level() -> str:
    """Instruction-set level in use ("avx2", …), or "none" without the library."""
    return "none" if why_missing() else str(torch.ops.qkernels.cpu_level())
