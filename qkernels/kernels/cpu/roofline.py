"""Measure what this machine can do at most with the instructions in use: bytes read and multiply-adds per second."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from qkernels.errors import BackendUnavailable
from qkernels.kernels.cpu import library

_TILE_OPS = {"portable": 4 * 1, "avx2": 4 * 1, "avx512vnni": 6 * 4}  # register tile of a probe round: rows x panels of 16 lanes


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
        rounds = 40_000 if level == "portable" else 1_000_000
        seconds = {what: min(torch.ops.qkernels.cpu_probe(what, buffer, rounds) for _ in range(5)) for what in ("read", "s8", "f32")}
        macs = rounds * count * _TILE_OPS[level] * 16
        rates = (buffer.nbytes / seconds["read"] / 1e9, 8 * macs / seconds["s8"] / 1e9, 2 * macs / seconds["f32"] / 1e9)
        return Roofline(*rates, None, level, count)
    finally:
        torch.set_num_threads(before)
