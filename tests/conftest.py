"""Every test: offline, seeded, two threads, and memory that nobody wrote is poison."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

from qkernels.kernels import device as devices
from qkernels.kernels.cpu import library

torch.use_deterministic_algorithms(True)  # torch then fills what it allocates, for our ops too: NaN, and the largest integer
assert torch.utils.deterministic.fill_uninitialized_memory


@pytest.fixture(autouse=True)
def _surroundings():
    torch.set_num_threads(2)
    torch.manual_seed(0)


def _forget_level():
    library.level.cache_clear()
    devices.current.cache_clear()


@pytest.fixture
def isa():
    """A function that switches the compiled kernels to a level ("any": as they are), or skips; the level is put back afterwards."""
    before = library.level()

    def switch(level):
        if level == "any":
            return
        if reason := library.why_missing():
            pytest.skip(reason)
        if not torch.ops.qkernels.cpu_has_level(level):
            pytest.skip(f"this machine has {before}, not {level}")
        torch.ops.qkernels.cpu_set_level(level)
        _forget_level()

    yield switch
    if before != "none":
        torch.ops.qkernels.cpu_set_level(before)
        _forget_level()
