"""Environment variables: the only file of the package that reads them.

| Variable          | Meaning                                                                            |
|-------------------|------------------------------------------------------------------------------------|
| `QKERNELS_ISA`    | run the CPU kernels at this level: portable, avx2, avx512vnni, avx512bf16, amx     |
| `QKERNELS_TABLES` | folder of the tables that `qkernels tune` writes; default ~/.cache/qkernels/tables |
"""

from __future__ import annotations

import os
from pathlib import Path

ISA_LEVELS = ("portable", "avx2", "avx512vnni", "avx512bf16", "amx")  # each contains the ones before it


def forced_isa() -> str | None:
    """Return the ISA level that the user forces, or None; raise ValueError on a level that does not exist."""
    level = os.environ.get("QKERNELS_ISA", "").strip().lower()
    if level and level not in ISA_LEVELS:
        raise ValueError(f"QKERNELS_ISA={level!r} is not one of {', '.join(ISA_LEVELS)}")
    return level or None


def tables_folder() -> Path:
    """Return the folder of the user's own tables of tiles; it need not exist."""
    return Path(os.environ.get("QKERNELS_TABLES", "").strip() or Path.home() / ".cache" / "qkernels" / "tables")
