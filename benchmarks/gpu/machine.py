"""What a GPU result depends on: the GPU, its driver and clocks, versions, and its measured limits."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch

from ..base import Arithmetic
from ..run import first_line
from .device import Gpu

SMI_FIELDS = ("uuid", "driver_version", "clocks.sm", "clocks.mem", "clocks.max.sm", "power.draw", "power.limit", "temperature.gpu")
COPY_BYTES = 1 << 30
PEAK = 8192  # M = N = K of the products that the peaks are measured with
TRIES = 10


@dataclass(frozen=True)
class Limits:
    """Measured: GB/s of a copy, bytes read and written both counted; 10¹² operations a second, a multiply-add is two.

    int8_tops is None where torch multiplies no int8 here; `note` says why.
    """

    copy_gbs: float
    bf16_tflops: float
    int8_tops: float | None = None
    note: str = ""

    def peak(self, arithmetic: Arithmetic) -> float:
        """10¹² operations a second; 16-bit products are the yardstick of all that is not int8."""
        return (self.int8_tops if arithmetic == "int8" else None) or self.bf16_tflops

    def limit_us(self, nbytes: int, ops: int, arithmetic: Arithmetic) -> float:
        """The least time for moving `nbytes` and doing `ops` operations, whichever takes longer."""
        return max(nbytes / (self.copy_gbs * 1e3), ops / (self.peak(arithmetic) * 1e6))


def measure_limits(gpu: Gpu) -> Limits:
    """The best of some tries of each, on random data: zeros cost less power and so raise the clocks."""
    source = torch.randn(COPY_BYTES // 4, device=gpu.device)
    target = torch.empty_like(source)
    copy_us = best_us(gpu, lambda: target.copy_(source))
    a, b = (torch.randn(PEAK, PEAK, device=gpu.device, dtype=torch.bfloat16) for _ in range(2))
    bf16_us = best_us(gpu, lambda: torch.mm(a, b))
    int8_us, note = _int8_us(gpu)
    gpu.free()
    tera_ops = 2 * PEAK**3 / 1e6  # over µs
    return Limits(2 * COPY_BYTES / copy_us / 1e3, tera_ops / bf16_us, tera_ops / int8_us if int8_us else None, note)


def best_us(gpu: Gpu, call: Callable[[], object]) -> float:
    return min(gpu.times_us([call] * (3 + TRIES))[3:])


def _int8_us(gpu: Gpu) -> tuple[float | None, str]:
    a, b = (torch.randint(-127, 128, (PEAK, PEAK), device=gpu.device, dtype=torch.int8) for _ in range(2))
    try:
        with gpu.watch("the int8 peak"):
            return best_us(gpu, lambda: torch._int_mm(a, b.t())), ""  # the second one column by column, as tensor cores want it
    except Exception as error:
        return None, f"int8 peak: {first_line(error)}"


def snapshot(uuid: str = "") -> dict[str, str]:
    """What nvidia-smi says now of the GPU with this uuid (of the first, where none has it): clocks in MHz, power in W, °C."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI_FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return {"note": first_line(error)}
    return parse_snapshot(text, uuid)


def parse_snapshot(text: str, uuid: str) -> dict[str, str]:
    """Pick the line of one GPU from nvidia-smi's table."""
    rows = [dict(zip(SMI_FIELDS, (part.strip() for part in line.split(",")))) for line in text.splitlines() if line.strip()]
    if not rows:
        return {"note": "nvidia-smi lists no GPU"}
    row = next((r for r in rows if uuid and r["uuid"].removeprefix("GPU-") == uuid), rows[0])
    return {name: value for name, value in row.items() if name != "uuid"}


def versions(packages: Iterable[str]) -> dict[str, str]:
    """CUDA's version as torch was built with, and those of installed packages."""
    found = {"cuda": torch.version.cuda or "none"}
    for package in dict.fromkeys(("triton", *packages)):
        try:
            found[package] = importlib.metadata.version(package)
        except (importlib.metadata.PackageNotFoundError, ValueError):
            continue
    return found


def slug(name: str) -> str:
    """A file name from a GPU's name: nvidia-h100-80gb-hbm3."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "gpu"
