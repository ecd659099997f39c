"""What a layer costs beyond its arithmetic: µs per call of a tiny layer, and bytes held."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .ours import DTYPES, float_linear, quant_linear
from .shapes import LayerShape
from .timing import Pace, Rotation, interleave

TINY = 64  # N = K: nothing to compute, so the time is the call's
CALLS = 200  # per measurement; a single call is too short for the clock
PACE = Pace(rounds=15, slot_s=0.01, pause_s=0)


@dataclass(frozen=True)
class Overhead:
    """µs per call of a 64×64 layer at M = 1; `extra_us` = our layer minus F.linear."""

    contestant: str
    f_linear_us: float
    nn_linear_us: float
    layer_us: float
    extra_us: float


@dataclass(frozen=True)
class Memory:
    """Bytes of one layer: what the format needs, what the layer says, what its tensors really hold."""

    contestant: str
    shape: str
    format_bytes: int
    stated_bytes: int
    held_bytes: int
    ratio: float  # held / format


def measure_overhead(format: str, compute: str, dtype: str) -> Overhead:
    """Time a 64×64 layer against F.linear and nn.Linear of the same type."""
    weight = torch.randn(TINY, TINY, generator=torch.Generator().manual_seed(0))
    x = torch.randn(1, TINY).to(DTYPES[dtype])
    plain = float_linear(weight, DTYPES[dtype])
    layer = quant_linear(weight, format, compute, DTYPES[dtype])
    calls = {"f_linear": lambda: F.linear(x, plain.weight), "nn_linear": lambda: plain(x), "layer": lambda: layer(x)}
    timings = interleave({name: Rotation([_repeat(call)]) for name, call in calls.items()}, PACE)
    us: dict[str, float] = {}
    for name, timing in timings.items():
        if isinstance(timing, Exception):
            raise timing
        us[name] = timing.median_us / CALLS
    name = f"qkernels {format} {compute}"
    return Overhead(name, us["f_linear"], us["nn_linear"], us["layer"], us["layer"] - us["f_linear"])


def _repeat(call: Callable[[], Tensor]) -> Callable[[], None]:
    def block() -> None:
        for _ in range(CALLS):
            call()

    return block


def measure_memory(format: str, compute: str, dtype: str, shape: LayerShape) -> Memory:
    """Compare the bytes that a prepared layer holds with those of its format."""
    weight = torch.randn(shape.n, shape.k, generator=torch.Generator().manual_seed(0))
    layer = quant_linear(weight, format, compute, DTYPES[dtype])
    needed, held = layer.quant_tensor().nbytes, held_bytes(layer)
    return Memory(f"qkernels {format} {compute}", shape.name, needed, layer.nbytes, held, held / needed)


def held_bytes(module: nn.Module) -> int:
    """Bytes of all storages reachable from a module's attributes, each once; what it says of itself is not asked."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(vars(module), set())}
    return sum(storages.values())


def _tensors(thing: object, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor within modules, dicts, sequences and plain objects."""
    if id(thing) in seen:
        return
    seen.add(id(thing))
    if isinstance(thing, Tensor):
        yield thing
    elif isinstance(thing, dict):
        for value in thing.values():
            yield from _tensors(value, seen)
    elif isinstance(thing, (list, tuple)):
        for value in thing:
            yield from _tensors(value, seen)
    elif isinstance(thing, nn.Module) or (hasattr(thing, "__dict__") and not callable(thing)):
        yield from _tensors(vars(thing), seen)
