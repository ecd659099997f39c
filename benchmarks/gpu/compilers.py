"""Processes that compile tiles side by side: what each has compiled Triton keeps on disk, where the process that measures finds it."""

from __future__ import annotations

import functools
import multiprocessing
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any, NamedTuple

import torch

from qkernels import formats
from qkernels.formats.tensor import QuantTensor, expected_tensors

MOST = 15


class Case(NamedTuple):
    """A product: a kernel's name, the format's, x [m, k] of a dtype and a weight [n, k]."""

    kernel: str
    format: str
    n: int
    k: int
    m: int
    dtype: torch.dtype


class Compilers:
    """A pool of processes, each with the GPU to itself for the moment of a call; none where there is one CPU to run them."""

    def __init__(self, start: Callable[[int], Executor] | None = None, cpus: int | None = None) -> None:
        count = min(MOST, (cpus or os.cpu_count() or 1) - 1)  # a process is left to measure
        start = start or (lambda count: ProcessPoolExecutor(count, mp_context=multiprocessing.get_context("spawn")))
        self._pool = start(count) if count > 1 else None

    def compile(self, case: Case, tiles: Sequence[Any]) -> None:
        """Wait until the tiles are compiled; those that cannot be, the measuring process finds out about by itself."""
        if self._pool is None or len(tiles) < 2:
            return
        try:
            list(self._pool.map(compile_one, [case] * len(tiles), tiles))
        except BrokenProcessPool:
            self._pool = None

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)


def compile_one(case: Case, tile: Any) -> str:
    """Run a tile once, on a weight of zeros. Returns why that is impossible, or ""."""
    from .tune import TUNABLE

    try:
        what = next(t for t in TUNABLE if t.kernel.name == case.kernel)
        x = torch.zeros(case.m, case.k, dtype=case.dtype, device="cuda")
        what.run(x, packed(case.kernel, case.format, case.n, case.k), torch.empty(case.m, case.n, dtype=case.dtype, device="cuda"), tile)
        torch.cuda.synchronize()
    except Exception as error:
        return str(error)
    return ""


@functools.lru_cache(maxsize=1)
def packed(kernel: str, format: str, n: int, k: int) -> Any:
    from .tune import TUNABLE

    what, shape = formats.get(format), (n, k)
    zeros = {
        name: torch.zeros(size, dtype=torch.uint8, device="cuda").to(kind) for name, (size, kind) in expected_tensors(what, shape).items()
    }
    return next(t for t in TUNABLE if t.kernel.name == kernel).kernel.prepare(QuantTensor.from_tensors(what, shape, zeros))
