"""Measure what this machine can do at most with the instructions in use: bytes read and multiply-adds per second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qkernels.errors import BackendUnavailable
from qkernels.kernels.cpu import library


@dataclass(frozen=True)
class Roofline:
    """Rates of all threads together: GB/s, and 10^9 operations a second (a multiply-add is two)."""

    read_gbs: float
    int8_gops: float
    fp32_gflops: float
    bf16_gflops: float | None
    level: str
    threads: int


def measure(threads: int | None = None, megabytes: int = 512) -> Roofline:
    """Best of several runs of each probe, about a second in all. Raises BackendUnavailable without the compiled library."""
    if reason := library.why_missing():
        raise BackendUnavailable(reason)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        buffer, level, count = torch.ones(megabytes << 20, dtype=torch.uint8), library.level(), torch.get_num_threads()
        rounds = 1_000 if level == "portable" else 20_000

        def best(what: str) -> float:
            return max(torch.ops.qkernels.cpu_probe(what, buffer, rounds) for _ in range(5)) / 1e9

        return Roofline(best("read"), 2 * best("s8"), 2 * best("f32"), 2 * best("bf16") or None, level, count)
    finally:
        torch.set_num_threads(before)
