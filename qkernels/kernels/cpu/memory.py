"""Memory that the kernels stream through."""

from __future__ import annotations

import mmap

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, of x86-64 and of ARM with 4 KiB pages; elsewhere the system rounds as it likes


def empty(nbytes: int) -> Tensor:
    """[nbytes] uint8, in huge pages as far as they fill and the system has them.

    A kernel that reads as fast as memory gives also waits for the translations of addresses, one for every page: with pages of 4 KiB 3 to
    9 % of the time at M = 1 (benchmarks/NOTES.md). What does not fill a huge page stays in small ones, so none is wasted.
    """
    whole = nbytes // HUGE_PAGE * HUGE_PAGE
    if whole and hasattr(mmap, "MADV_HUGEPAGE"):
        try:  # a multiple of the huge page is what Linux aligns to it; pages beyond nbytes are never touched
            memory = mmap.mmap(-1, -(-nbytes // HUGE_PAGE) * HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            memory.madvise(mmap.MADV_HUGEPAGE, 0, whole)
        except OSError:  # a kernel without them, or a limit on mappings
            pass
        else:
            return torch.frombuffer(memory, dtype=torch.uint8, count=nbytes)
    return torch.empty(nbytes, dtype=torch.uint8, device="cpu")
