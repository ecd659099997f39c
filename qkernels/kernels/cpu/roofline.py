"""Measure what this machine can do at most with the instructions in use: bytes read and multiply-adds per second."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from qkernels.errors import BackendUnavailable
from qkernels.kernels.cpu import library, memory


@dataclass(frozen=True)
class Roofline:
    """Rates of all threads together: GB/s, and 10^9 operations a second (a multiply-add is two)."""

    read_gbs: float
    int8_gops: float
    fp32_gflops: float
    bf16_gflops: float | None
    level: str
    threads: int


def reader(nbytes: int) -> Callable[[], float]:
    """A function that reads a buffer of `nbytes`, in memory as weights have it, once with all threads, and returns bytes per second.

    Each thread follows one stream of addresses, or four, or one whose lines it fetches beforehand: what was fastest when the function was
    made. That depends on the CPU, and on what else its memory has to do at the time.
    """
    buffer = memory.empty(nbytes).fill_(1)

    def read(way: str) -> float:
        return torch.ops.qkernels.cpu_probe(way, buffer, 1)

    ways = ("read", "read4", "fetch")
    rates = [[read(way) for way in ways] for _ in range(9)]
    medians = [statistics.median(column) for column in zip(*rates, strict=True)]
    return partial(read, ways[medians.index(max(medians))])


def measure(threads: int | None = None, megabytes: int = 512) -> Roofline:
    """Best of several runs of each probe, about a second in all. Raises BackendUnavailable without the compiled library."""
    if reason := library.why_missing():
        raise BackendUnavailable(reason)
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        read, level, count = reader(megabytes << 20), library.level(), torch.get_num_threads()
        nothing = torch.empty(0, dtype=torch.uint8)
        rounds = 1_000 if level == "portable" else 20_000

        def best(what: str) -> float:
            return 2 * max(torch.ops.qkernels.cpu_probe(what, nothing, rounds) for _ in range(5)) / 1e9

        return Roofline(max(read() for _ in range(5)) / 1e9, best("s8"), best("f32"), best("bf16") or None, level, count)
    finally:
        torch.set_num_threads(before)
