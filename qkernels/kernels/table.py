"""The table of formats by kernels, as docs/formats.md prints it."""

from __future__ import annotations

from qkernels import formats
from qkernels.kernels import registry
from qkernels.kernels.device import Device


def markdown() -> str:
    """One row a format: name, short names, bits per weight, and which kernels run it: on an x86 CPU, and on a GPU of the Hopper kind."""
    kernels = registry.all_kernels()
    devices = {k.name: Device("cuda", sm=90) if k.backend in ("triton", "cuda") else Device("cpu", isa="avx2") for k in kernels}
    rows = [f"| format | short names | bits / weight | {' | '.join(k.name for k in kernels)} |", "|---" * (3 + len(kernels)) + "|"]
    for f in formats.all_formats():
        problems = {k.name: registry.Problem(f, 4096, 4096, device=devices[k.name]) for k in kernels}
        able = " | ".join("yes" if k.why_not(problems[k.name]) is None else "–" for k in kernels)
        short = ", ".join(alias for alias, name in formats.aliases().items() if name == f.name)
        rows.append(f"| `{f.name}` | {short} | {f.bits_per_weight():.3f} | {able} |")
    return "\n".join(rows)
