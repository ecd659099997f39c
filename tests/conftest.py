"""Every test: offline, seeded, two threads, and memory that nobody wrote is poison."""

import ctypes
import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# A thread of OpenMP's that has nothing to do sleeps: by default it spins, on a core that another process of `pytest -n` works on. Before
# torch is imported, and for the processes that tests start.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

from qkernels.kernels import device as devices
from qkernels.kernels.cpu import library

# torch's allocator then fills what it gives, to our ops too, with 0x7fedbeef: a NaN in float32, and every other number in 16 bits.
_C10 = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
ctypes.c_bool.in_dll(_C10, "FLAGS_caffe2_cpu_allocator_do_junk_fill").value = True
assert torch.empty(1).isnan()


def pytest_collection_modifyitems(items):
    """The longest first: in the end no process works at one while the others have nothing left to do."""
    items.sort(key=lambda item: item.get_closest_marker("long") is None)


@pytest.fixture(autouse=True)
def _surroundings():
    torch.set_num_threads(2)
    torch.manual_seed(0)


@pytest.fixture
def one_thread(_surroundings):
    """For models so small that a second thread is only waited for."""
    torch.set_num_threads(1)


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
