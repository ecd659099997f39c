"""Contestants that are right, wrong or fail on purpose, and a record of what the harness makes of them."""

from __future__ import annotations

import pytest
import torch

from . import goals
from .base import Contestant, Prepared
from .machine import Roofline
from .peers.aten import linear
from .run import measure_shape, with_limits
from .shapes import LayerShape
from .timing import Pace

TINY = LayerShape(64, 128)
FAST = Pace(rounds=2, slot_s=1e-4, pause_s=0)
LIMITS = Roofline(read_gbs=10, int8_gops=1000, bf16_gflops=None, fp32_gflops=100, level="test")


def contestant(name: str, kind: str = "qkernels", spoil=lambda y: y, prepare=None) -> Contestant:
    """A bf16 layer whose output goes through `spoil`."""

    def spoiled(weight, threads):
        good = linear(torch.bfloat16, weight)
        return Prepared(good.weight, good.nbytes, lambda: lambda x, layer=good.make(): spoil(layer(x)))

    return Contestant(name, kind, "bf16", "bf16", torch.bfloat16, prepare or spoiled)


def raising(error: Exception):
    def prepare(weight, threads):
        raise error

    return prepare


class UnsupportedError(Exception):
    """Named like the library's own."""


def sample_record() -> dict:
    """Results of good, wrong, failing and unsupported contestants, as the JSON has them."""
    contestants = [
        contestant(goals.INT4),
        contestant(goals.TORCH, "torch"),
        contestant("wrong", spoil=lambda y: y * 1.05),
        contestant("not finite", spoil=lambda y: y / 0),
        contestant("peer that fails", "peer", prepare=raising(RuntimeError("no such [thing]"))),
        contestant("unsupported", prepare=raising(UnsupportedError("K = 128 is too small"))),
    ]
    results = [r for shape in (TINY, LayerShape(64, 256)) for r in measure_shape(shape, contestants, [1, 4], 1, FAST)]
    machine = {"cpu": "Test CPU", "isa": [], "cores": 2, "cache_bytes": 0, "memory_bytes": 1 << 30, "system": "Linux"}
    made = {"machine": machine, "versions": {"torch": "2"}, "commit": "0123456789ab", "command": "c", "date": "2026-01-01 00:00 UTC"}
    made |= {"threads": 1, "roofline": LIMITS.__dict__, "missing_peers": {"x": "not installed"}}
    made["results"] = [with_limits(r, LIMITS).__dict__ for r in results]
    made["overhead"] = [{"contestant": "q", "layer_us": 9.0, "f_linear_us": 2.0, "nn_linear_us": 3.0, "extra_us": 7.0}]
    return made | {"goals": goals.judge_all(made)}


@pytest.fixture(scope="module")
def measured() -> dict:
    return sample_record()
