"""Libraries of ours that were compiled when the package was installed (setup.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

_PACKAGE = Path(__file__).resolve().parents[1]


def built() -> dict[str, Any]:
    """What the build noted of itself; nothing where nothing was built."""
    info = _PACKAGE / "_build_info.json"
    return json.loads(info.read_text()) if info.exists() else {}


def load(name: str, reason: str) -> str | None:
    """Load a library; None when it is there, else why not: for one that was not built, what the build noted under the key `reason`."""
    path = _PACKAGE / f"{name}.abi3.so"
    if not path.exists():
        return f"the compiled library is missing: {built().get(reason) or 'the package was installed without building it'}"
    try:
        torch.ops.load_library(str(path))
    except (OSError, RuntimeError) as error:
        return f"the compiled library does not load: {str(error).splitlines()[0]}"
    return None
