"""The few CUDA calls that measuring needs, in one class, so that tests can put a fake in its place."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ..run import first_line

Call = Callable[[], Tensor]


class NoDevice(Exception):
    """There is no GPU to measure on; the message says why."""


class DeviceLost(Exception):
    """An earlier error has left the process without a working GPU."""


@dataclass(frozen=True)
class Graph:
    """Captured calls; `output` is where every replay leaves the result of the last one."""

    replay: Callable[[], object]
    output: Tensor


class Gpu:
    """The current CUDA device. `lost` says which error made it unusable, if one did."""

    device = torch.device("cuda")
    lost = ""

    def __init__(self) -> None:
        """Raises: NoDevice."""
        if not torch.cuda.is_available():
            built = torch.version.cuda or torch.version.hip
            why = (
                "torch finds none; `nvidia-smi` tells what the driver sees" if built else f"torch {torch.__version__} is built without CUDA"
            )
            raise NoDevice(f"no CUDA device: {why}")
        self._renew()

    def _renew(self) -> None:
        self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()

    def properties(self) -> dict:
        """Name, compute capability times ten, multiprocessors, bytes of L2 cache and of memory."""
        found = torch.cuda.get_device_properties(self.device)
        return {
            "name": found.name,
            "sm": 10 * found.major + found.minor,
            "sms": found.multi_processor_count,
            "l2_bytes": found.L2_cache_size,
            "memory_bytes": found.total_memory,
            "uuid": str(getattr(found, "uuid", "")),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize()

    def free(self, collect: bool = False) -> None:
        """Give the memory of graphs and copies that are gone back, so that the next ones find it in one piece.

        A new pool for the next graphs, too: torch takes none that has been used and is used no more.
        """
        if self.lost:
            return  # nothing can be given back any more
        if collect:
            gc.collect()
        self._pool = torch.cuda.graph_pool_handle()
        with suppress(RuntimeError):  # torch's allocator may remember a capture that failed as one under way; all else still works
            torch.cuda.empty_cache()

    def warm_up(self, calls: Sequence[Call]) -> None:
        """Make every call once on the stream that captures, and wait: libraries compile, pack and allocate on a first call."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for call in calls:
                call()
        torch.cuda.synchronize()

    def capture(self, calls: Sequence[Call]) -> Graph:
        """Capture calls in a graph; all graphs until the next `free` share their memory.

        Not torch.cuda.graph: it empties the allocator each time, and leaves its stream current when the capture fails.
        """
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        collecting = gc.isenabled()
        gc.disable()  # a tensor or graph that dies during a capture may invalidate it
        try:
            with torch.cuda.stream(self._stream):
                self._capture(graph, calls)
                output = self._output
        finally:
            self._output = None
            if collecting:
                gc.enable()
        return Graph(graph.replay, output)

    _output: Tensor | None = None

    def _capture(self, graph: torch.cuda.CUDAGraph, calls: Sequence[Call]) -> None:
        try:
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            for call in calls:
                self._output = None  # before the next call, which then finds its memory free
                self._output = call()
            graph.capture_end()
        except BaseException:
            self._abandon(graph)
            raise

    def _abandon(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed. Where its end raises, torch leaves the allocator capturing, and could never give memory back."""
        self._output = None
        with suppress(Exception):
            graph.capture_end()
        with suppress(Exception):
            torch._C._cuda_endAllocateToPool(torch.cuda.current_device(), self._pool)
            torch._C._cuda_releasePool(torch.cuda.current_device(), self._pool)
        with suppress(Exception):
            self._renew()

    def times_us(self, calls: Sequence[Callable[[], object]]) -> list[float]:
        """GPU time of each call in µs. All are queued before any is waited for; the first one's time includes its launch."""
        events = [torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)]
        events[0].record()
        for call, event in zip(calls, events[1:], strict=True):
            call()
            event.record()
        events[-1].synchronize()
        return [1000 * before.elapsed_time(after) for before, after in pairwise(events)]

    def probe(self) -> None:
        """Compute something trivial; raises after an error that CUDA does not recover from, such as an illegal address."""
        if torch.ones(8, device=self.device).sum().item() != 8:
            raise RuntimeError("the sum of eight ones is not 8")
        torch.cuda.synchronize()

    def examine(self, who: str, what: str) -> None:
        """After an error, see whether the GPU still works; if not, remember who was at work."""
        if self.lost:
            return
        try:
            self.probe()
        except torch.OutOfMemoryError:  # the error at hand still holds the memory; it will be free
            return
        except Exception as error:
            self.lost = f"{who}: {what}; since then: {first_line(error)}"

    @contextmanager
    def watch(self, who: str) -> Iterator[None]:
        """Examine the GPU if the body raises. Raises DeviceLost, without running the body, when it is lost already."""
        if self.lost:
            raise DeviceLost("not measured: the GPU had stopped working before")
        try:
            yield
        except Exception as error:
            self.examine(who, first_line(error))
            raise
