"""Environment variables: the only file of the package that reads them.

| Variable       | Meaning                                                                            |
|----------------|------------------------------------------------------------------------------------|
| `QKERNELS_ISA` | run the CPU kernels at this level: portable, avx2, avx512vnni, avx512bf16          |
"""

from __future__ import annotations

import os

ISA_LEVELS = ("portable", "avx2", "avx512vnni", "avx512bf16")  # each contains the ones before it


def forced_isa() -> str | None:
    """Return the ISA level that the user forces, or None; raise ValueError on a level that does not exist."""
    level = os.environ.get("QKERNELS_ISA", "").strip().lower()
    if level and level not in ISA_LEVELS:
        raise ValueError(f"QKERNELS_ISA={level!r} is not one of {', '.join(ISA_LEVELS)}")
    return level or None
