"""The compiled CUDA library: load it once, or say why it is not there."""

from __future__ import annotations

import functools
import re

from qkernels.kernels import compiled
from qkernels.kernels.registry import Problem


@functools.lru_cache(maxsize=1)
def why_missing() -> str | None:
    """Load the library, for which no GPU and no driver is needed; None when it is there, else the reason."""
    return compiled.load("_CUDA", "cuda_reason")


def why_not(p: Problem, source: str, oldest: int) -> str | None:
    """Why csrc/cuda/<source>.cu, written for GPUs from sm<oldest> on, cannot run."""
    if p.device.type != "cuda":
        return f"runs on cuda, not {p.device.type}"
    if p.device.sm < oldest:
        return f"needs sm{oldest}, not sm{p.device.sm}"
    if not p.device.compiled:
        return why_missing() or "the compiled library is missing, or the GPU is not NVIDIA's"
    found = architectures(source)
    if found is None or any(covers(one, p.device.sm) for one in found):
        return None
    return f"is compiled for {', '.join(found) or 'no GPU that it could run on'} (TORCH_CUDA_ARCH_LIST), not sm{p.device.sm}"


@functools.lru_cache(maxsize=16)
def architectures(source: str) -> tuple[str, ...] | None:
    """What a source was compiled for, "8.0" or "9.0+PTX"; None where nothing was built, and devices are mere descriptions."""
    of_all = compiled.built().get("cuda_architectures")
    return None if of_all is None else tuple(of_all.get(source, ()))


def for_all() -> str:
    """What any of the sources was compiled for."""
    found = {one for listed in compiled.built().get("cuda_architectures", {}).values() for one in listed}
    return ", ".join(sorted(found, key=lambda one: (float(re.findall(r"[\d.]+", one)[0]), one)))


def covers(architecture: str, sm: int) -> bool:
    """Whether a GPU runs what was compiled for another: of the same major version, if not newer; by PTX, any that is not newer."""
    major, minor = map(int, re.findall(r"\d+", architecture))
    runs = 10 * major + minor <= sm
    return runs and (major == sm // 10 or "PTX" in architecture)
