"""Every test: offline, seeded, two threads, and memory that nobody wrote is poison."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

torch.set_num_threads(2)
_EMPTY, _EMPTY_LIKE = torch.empty, torch.empty_like
with torch.device("meta"):  # torch lists the functions that this redirects at its first use: before they are replaced
    assert torch.empty(1).is_meta


def _poison(t):
    with torch.no_grad():
        if t.is_floating_point() and t.element_size() > 1:
            t.fill_(float("nan"))
        elif t.element_size() == 1 and t.dtype != torch.bool:
            t.detach().view(torch.uint8).fill_(0xFF if t.is_floating_point() else 0xAA)
    return t


def _poisoned(real):
    def make(*args, **kwargs):
        t = real(*args, **kwargs)
        return t if torch.compiler.is_compiling() or t.is_meta else _poison(t)

    return make


@pytest.fixture(autouse=True)
def _surroundings(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch, "empty", _poisoned(_EMPTY))
    monkeypatch.setattr(torch, "empty_like", _poisoned(_EMPTY_LIKE))
    yield
    torch.set_num_threads(2)
