"""What launching needs that is no kernel's own: the GPU's numbers, regular arguments, and where the parts of a split K meet."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.errors import FormatError
from qkernels.kernels.registry import Matmul, Problem

SPLITS = (1, 2, 3, 4, 6, 8, 12, 16)  # parts of K; few: each is a kernel to compile
MOST_LAUNCHES = 8192  # remembered for a kernel: each number of rows is one
STREAMS, TILES = 32, 4096  # counters are made for so many streams at a time, and tiles of each


class Gpu(NamedTuple):
    """What the choice of a tile depends on."""

    processors: int
    shared_bytes: int  # that one block may have
    early: bool  # whether a kernel can begin while the one before it ends: Hopper and newer
    name: str = ""  # by which tables of tiles are found; "": none are


@functools.lru_cache(maxsize=16)
def gpu_of(device: torch.device) -> Gpu:
    """Of a CUDA device; the interpreter plays an H100."""
    if device.type != "cuda":
        return Gpu(132, 227 << 10, early=False)
    found = torch.cuda.get_device_properties(device)
    shared = found.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return Gpu(found.multi_processor_count, shared, begins_early(found.major), found.name)


@functools.lru_cache(maxsize=1)
def triton_version() -> tuple[int, int]:
    """Major and minor: tiles that pay, and some details of what is compiled, differ from one to the next. (0, 0) where there is none."""
    if importlib.util.find_spec("triton") is None:
        return 0, 0
    import triton

    major, minor = triton.__version__.split(".")[:2]
    return int(major), int(minor)


def begins_early(major: int) -> bool:
    """Whether a kernel can begin while the one before it ends, on a GPU of that compute capability; Triton 3.4 cannot compile it."""
    return major >= 9 and triton_version() >= (3, 5)


def lanes_last() -> bool:
    """Which axis of equal rank Triton gives to lanes first: it changed. See `word_rows`."""
    return triton_version() >= (3, 7)


def why_not(p: Problem) -> str | None:
    """What no Triton kernel of ours can do."""
    if p.device.type != "cuda":
        return f"runs on cuda, not {p.device.type}"
    if p.device.sm < 80:
        return f"needs sm80 (Ampere), not sm{p.device.sm}"
    return None if p.device.triton else "Triton is not installed (pip install 'qkernels[gpu]'), or the GPU is not NVIDIA's"


def over_rows(x: Tensor, n: int, multiply: Callable[[Tensor, Tensor], None]) -> Tensor:
    """x [..., K] -> [..., n]: `multiply(rows [M, K], out [M, n])` with dense rows, on x's device, where there are rows at all."""
    rows, out = x.reshape(-1, x.shape[-1]), x.new_empty((*x.shape[:-1], n))
    if rows.shape[0] == 0:
        return out
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    if x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current one
        with torch.cuda.device(x.device):
            multiply(rows, out.view(-1, n))
    else:
        multiply(rows, out.view(-1, n))
    return out


def gathered(multiply: Callable[..., Tensor]) -> Matmul:
    """A layer's matmul from `multiply(x, weight, scales, zeros, tensor_scale, bias)`: columns of x come into the weight's order before."""

    def matmul(
        x: Tensor,
        weight: Tensor,
        scales: Tensor,
        zeros: Tensor | None,
        tensor_scale: Tensor | None,
        perm: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        if perm is not None:
            x = x.index_select(-1, perm)
        return multiply(x, weight, scales, zeros, tensor_scale, bias)

    return matmul


def check(x: Tensor, weight: Tensor, columns: int) -> None:
    """Raise FormatError unless x [..., K] lies where the weight does and has at most the weight's padded `columns`."""
    if x.device != weight.device:
        raise FormatError(f"x is on {x.device}, the weight on {weight.device}: move one of them")
    if not 0 < x.shape[-1] <= columns:
        raise FormatError(f"x has {x.shape[-1]} columns; the weight has room for {columns}")


def regular(x: Tensor, *others: Tensor | None) -> bool:
    """Whether all addresses are multiples of 16, and rows of x follow each other: Triton compiles other kernels where they are not."""
    addresses = x.data_ptr()
    for t in others:
        if t is not None:
            addresses |= t.data_ptr()
    return addresses % 16 == 0 and x.stride(0) == x.shape[1]


def remember(launches: dict[tuple[Any, ...], Any], key: tuple[Any, ...], launch: Any) -> None:
    if len(launches) >= MOST_LAUNCHES:
        launches.clear()
    launches[key] = launch


# -- counters: a kernel that splits K finds zeros and leaves zeros -----------------------------------------------------------------------

_FREE: dict[torch.device, list[Tensor]] = {}
_TAKEN: dict[tuple[torch.device, int], Tensor] = {}


def reserve(device: torch.device) -> None:
    """Make counters for the streams of a device beforehand: what a CUDA graph allocates is zero only while it runs."""
    if not _FREE.get(device):
        _FREE[device] = list(torch.zeros((STREAMS, TILES), dtype=torch.int32, device=device))


def workspace(split_k: int, m: int, n: int, tiles: int, device: torch.device, stream: int) -> tuple[Tensor | None, Tensor | None]:
    """Where the parts of a split K meet: float32 sums [split_k, M, N], and a counter for each tile; nothing where K is whole.

    Each stream has counters of its own, as its kernels run one after the other; a graph has those of the stream that it was captured on:
    do not replay it beside another graph of that stream, or beside that stream.
    """
    if split_k == 1:
        return None, None
    counters = torch.zeros(tiles, dtype=torch.int32, device=device) if tiles > TILES else counters_of(device, stream)
    return torch.empty((split_k, m, n), dtype=torch.float32, device=device), counters


def counters_of(device: torch.device, stream: int) -> Tensor:
    """The counters of a stream, [TILES] int32."""
    counters = _TAKEN.get((device, stream))
    if counters is None:
        reserve(device)
        counters = _TAKEN[device, stream] = _FREE[device].pop()
    return counters
