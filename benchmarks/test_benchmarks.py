"""The benchmark's cases under pytest-benchmark: `pytest benchmarks --benchmark-only`."""

from __future__ import annotations

import pytest
import torch

from . import peers
from .base import Contestant
from .check import check
from .ours import contestants
from .run import copies_of, inputs
from .shapes import LayerShape
from .timing import Rotation

pytest.importorskip("pytest_benchmark")

SHAPE = LayerShape(4096, 4096)
MS = (1, 16, 128, 512)
CONTESTANTS = [*contestants(["int4", "int8"], ["int8", "float"], "bfloat16"), *peers.ALL]


@pytest.fixture(scope="module", params=CONTESTANTS, ids=lambda c: c.name.replace(" ", "-"))
def entrant(request):
    """A contestant with its prepared layer and as many copies as the caches cannot hold."""
    contestant: Contestant = request.param
    if contestant in peers.OTHERS and (reason := peers.why_not(contestant, torch.get_num_threads())):
        pytest.skip(reason)
    weight = torch.randn(SHAPE.n, SHAPE.k, generator=torch.Generator().manual_seed(0)) * SHAPE.k**-0.5
    with torch.inference_mode():
        prepared = contestant.prepare(weight, torch.get_num_threads())
        return contestant, prepared, copies_of(prepared)


@pytest.mark.parametrize("m", MS)
def test_speed(benchmark, entrant, m):
    """Time one call; the result is checked first, so a wrong one has no time."""
    contestant, prepared, copies = entrant
    with torch.inference_mode():
        x = inputs(SHAPE, [m])[m].to(contestant.dtype)
        check(prepared, prepared.arithmetic or contestant.arithmetic, x, copies[0](x))
        rotation = Rotation([lambda copy=copy: copy(x) for copy in copies])
        benchmark.extra_info |= {"kernel": prepared.kernel, "nbytes": prepared.nbytes, "m": m}
        benchmark.pedantic(rotation.time_us, rounds=20, warmup_rounds=len(copies))  # libraries pack weights on a copy's first call
