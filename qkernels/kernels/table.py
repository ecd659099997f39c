"""The table of formats by kernels, as the README prints it."""

from __future__ import annotations

from qkernels import formats
from qkernels.kernels import registry
from qkernels.kernels.device import Device


def markdown() -> str:
    """One row a format: name, short names, bits per weight, and which kernel runs it on an x86 CPU."""
    kernels, device = registry.all_kernels(), Device("cpu", isa="avx2")
    rows = [f"| format | short names | bits / weight | {' | '.join(k.name for k in kernels)} |", "|---" * (3 + len(kernels)) + "|"]
    for f in formats.all_formats():
        problem = registry.Problem(f, 4096, 4096, device=device)
        able = " | ".join("yes" if k.why_not(problem) is None else "–" for k in kernels)
        short = ", ".join(alias for alias, name in formats.aliases().items() if name == f.name)
        rows.append(f"| `{f.name}` | {short} | {f.bits_per_weight():.3f} | {able} |")
    return "\n".join(rows)
