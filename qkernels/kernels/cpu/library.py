"""The compiled library: load it once, or say why it is not there."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import torch

from qkernels import config
from qkernels.errors import FormatError

_PACKAGE = Path(__file__).resolve().parents[2]


@functools.lru_cache(maxsize=1)
def why_missing() -> str | None:
    """Load the library; None when it is there, else the reason."""
    path = _PACKAGE / "_C.abi3.so"
    if not path.exists():
        info = _PACKAGE / "_build_info.json"
        built = json.loads(info.read_text()) if info.exists() else {}
        return f"the compiled library is missing: {built.get('reason') or 'the package was installed without building it'}"
    try:
        torch.ops.load_library(str(path))
        torch.ops.qkernels.cpu_set_level(config.forced_isa() or "")
    except ValueError as error:
        raise FormatError(str(error)) from None
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {str(error).splitlines()[0]}"
    return None


@functools.lru_cache(maxsize=1)
def level() -> str:
    """Instruction-set level in use ("avx2", …), or "none" without the library."""
    return "none" if why_missing() else str(torch.ops.qkernels.cpu_level())
