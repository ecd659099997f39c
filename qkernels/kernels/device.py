"""Device: what a kernel needs to know of the hardware, as data: it can be made without having the hardware."""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass

import torch

from qkernels.config import ISA_LEVELS
from qkernels.errors import BackendUnavailable, FormatError


@dataclass(frozen=True)
class Device:
    """A kind of device.

    type    "cpu", "cuda" or "meta"
    isa     CPU: the instruction-set level of the compiled kernels ("avx2", …), or "none" without the compiled library
    sm      CUDA: compute capability times ten (90 = Hopper)
    triton  CUDA: whether our Triton kernels can run: it is installed, and the GPU is NVIDIA's
    compiled  CUDA: whether the compiled kernels can run: their library is there
    """

    type: str
    isa: str = "none"
    sm: int = 0
    triton: bool = True
    compiled: bool = True

    def __str__(self) -> str:
        return {"cpu": f"cpu:{self.isa}", "cuda": f"cuda:sm{self.sm}"}.get(self.type, self.type)

    def has_isa(self, level: str) -> bool:
        return self.isa in ISA_LEVELS and ISA_LEVELS.index(self.isa) >= ISA_LEVELS.index(level)


def parse(spec: str) -> Device:
    """Return the device that "cpu", "cpu:avx2", "cuda:sm90" or "meta" spells; plain "cpu" is this machine's."""
    if spec == "cpu":
        return current("cpu")
    if spec == "meta":
        return Device("meta")
    if spec.startswith("cpu:") and spec[4:] in (*ISA_LEVELS, "none"):
        return Device("cpu", isa=spec[4:])
    if m := re.fullmatch(r"cuda:sm(\d{2,3})", spec):
        return Device("cuda", sm=int(m[1]))
    raise FormatError(f"unknown device {spec!r}; write cpu, cpu:<{'|'.join(ISA_LEVELS)}|none>, cuda:sm<NN> or meta")


@functools.lru_cache(maxsize=32)
def current(device: torch.device | str) -> Device:
    """Describe a device of this machine."""
    device = torch.device(device)
    if device.type == "cpu":
        from qkernels.kernels.cpu import library

        return Device("cpu", isa=library.level())
    if device.type == "cuda":
        from qkernels.kernels.cuda import library as compiled

        (major, minor), nvidia = torch.cuda.get_device_capability(device), torch.version.hip is None
        triton = nvidia and importlib.util.find_spec("triton") is not None
        return Device("cuda", sm=10 * major + minor, triton=triton, compiled=nvidia and compiled.why_missing() is None)
    if device.type == "meta":
        return Device("meta")
    raise BackendUnavailable(f"no kernels for device type {device.type!r}; cpu, cuda and meta are known")
