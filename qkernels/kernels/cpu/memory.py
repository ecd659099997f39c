"""Memory that the kernels stream through."""

from __future__ import annotations

import contextlib
import mmap
import threading

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, of x86-64 and of ARM with 4 KiB pages; elsewhere the system rounds as it likes
SHARED = 32 << 20  # bytes of a mapping whose pages tensors share
LEAST = 32 << 10  # bytes from which a tensor is worth a place there


def empty(nbytes: int) -> Tensor:
    """[nbytes] uint8, in huge pages as far as the system has them.

    A kernel that reads as fast as memory gives also waits for the translations of addresses, one for every page: with pages of 4 KiB 3 to
    9 % of the time at M = 1, and up to 20 % where the scales alone lie in them (benchmarks/NOTES.md). What is larger than a huge page has
    some of its own, and small ones where it does not fill the last; what is smaller shares them with other tensors.
    """
    if nbytes < LEAST:
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
    try:
        return _shared(nbytes) if nbytes < HUGE_PAGE else _tensor(_mapping(nbytes, nbytes // HUGE_PAGE * HUGE_PAGE), nbytes)
    except OSError:  # a limit on mappings
        return torch.empty(nbytes, dtype=torch.uint8, device="cpu")


def _mapping(nbytes: int, huge: int) -> mmap.mmap:
    """Fresh memory, of which the first `huge` bytes are asked for in huge pages."""
    # A multiple of the huge page is what Linux aligns to it; pages beyond nbytes are never touched.
    memory = mmap.mmap(-1, -(-nbytes // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without them
            memory.madvise(mmap.MADV_HUGEPAGE, 0, huge)
    return memory


def _tensor(memory: mmap.mmap, nbytes: int, offset: int = 0) -> Tensor:
    return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes, offset=offset)  # keeps the mapping


_LOCK = threading.Lock()
_memory: mmap.mmap | None = None  # where the next small tensors go
_used = 0


def _shared(nbytes: int) -> Tensor:
    """A piece of a mapping, which goes when all its tensors and those after it have gone."""
    global _memory, _used
    with _LOCK:
        if _memory is None or _used + nbytes > SHARED:
            _memory, _used = _mapping(SHARED, SHARED), 0
        memory, offset = _memory, _used
        _used += -(-nbytes // 64) * 64
    return _tensor(memory, nbytes, offset)
