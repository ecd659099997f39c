"""fp16 and bf16 activations against codes of 2 to 6 and of 8 bits: one tensor-core kernel from decoding to prefill.

The dequantised weight is the left operand of the tensor core's product, which on Hopper comes straight from registers; tokens are its
columns, in multiples of 16. Sums are float32; a split of K adds its parts in a fixed order, so a result is the same on every run. How K is
split depends on the number of rows, but for `triton_f16_wN_gemm_invariant`, the same kernel cut in one way for all of them.
Many rows, and float32 activations, go through f16_dequantize.py and torch's matmul; gradients through f16_backward.py.
With nested blocks (ggml's) and minima no GPU has run it yet.

Layout: see layout.py.

Source: weights as the left operand from registers: Machete and humming; the order of codes after Marlin's; magic-number unpacking as in
FasterTransformer; grouped rasterisation from Triton's tutorials. Written from scratch.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import formats
from qkernels.errors import UnsupportedError
from qkernels.formats import QuantFormat, QuantTensor
from qkernels.kernels.registry import Kernel, Matmul, Problem, register
from qkernels.kernels.triton import layout, tables
from qkernels.kernels.triton.f16_backward import backward
from qkernels.kernels.triton.f16_dequantize import by_rows, dequantize
from qkernels.kernels.triton.f16_format import Stored, arithmetic, constants, mode, rest_needed, table
from qkernels.kernels.triton.launch import (
    SPLITS,
    Gpu,
    check,
    gathered,
    gpu_of,
    lanes_last,
    over_rows,
    regular,
    remember,
    reserve,
    why_not,
    workspace,
)
from qkernels.kernels.triton.layout import Packed, restore

TOKENS_FUSED = 1024  # from here on, dequantising the weight costs less than torch's matmul gains
ROWS_INVARIANT = 1024  # a launch, where K is split for any M: the parts of more rows would take too much memory


class Tile(NamedTuple):
    """How one launch cuts its problem."""

    block_n: int
    block_m: int
    num_warps: int
    split_k: int = 1
    num_stages: int = 3
    sums: bool = True  # scales are applied to the sums, not to the weights, where the format allows it
    early: bool = False  # begins, and fetches its first weights, while the kernel before it ends
    raster: int = 8  # tiles of weights that are worked on side by side
    step: int = 1  # tiles of K worked on at a time: 1 or 2
    registers: int = 0  # of a thread, at most; 0: as many as the compiler likes


def choose(
    n: int, k: int, m: int, tile_k: int, gpu: Gpu, where: str = "sum", zeros: bool = False, groups: int = 1, heavy: bool = False
) -> Tile:
    """The tile for x [m, k] and a weight [n, k]: the best of a sweep on an H100 (benchmarks/NOTES.md), by classes of shapes.

    Whatever the tile, two blocks or more on every processor are wanted: while one unpacks weights, the other multiplies.
    where: the `mode`; scales on the weights, and zero points, take registers; so do many groups in a tile, and where it is heavy: with
    minima, or scales of scales, of which no sweep was made.
    """
    plain = where != "word" and not zeros
    wide = -(-n // 64) >= 2 * gpu.processors  # enough rows to fill the GPU without splitting K
    deep = k >= 8192
    if m <= 16 and wide:  # as many blocks as fit: what is on its way bounds the bandwidth
        few = 128 if heavy else 72 if plain else 80 if groups < 8 else 96
        t = Tile(64, 16, 4, early=True, registers=few if gpu.early and tile_k <= 128 else 0)
    elif heavy and tile_k == 256:  # twice the numbers of a tile: with more sums, or threads, there is no room for a second block
        t = Tile(64, 16 if m <= 16 else 32 if m <= 32 or zeros else 64, 4, early=True)
    elif m <= 16:
        t = Tile(64, 16, 4, early=True, step=2) if deep else Tile(128, 16, 8, early=True)
    elif m <= 32:
        t = Tile(128, 32, 4, early=True) if deep and not wide and where == "sum" and not zeros else Tile(64, 32, 4, early=True)
    elif m <= 64:
        t = Tile(128, 64, 8, early=True) if wide else Tile(64, 64, 4)
    elif m <= 128:
        t = Tile(64, 128, 4) if plain and (wide or deep) else Tile(64, 64, 4)
    elif m > 512 or (m <= 256 and wide):
        t = Tile(128, 128 if heavy else 256, 8, sums=False)
    elif m <= 256:
        t = Tile(64, 128, 4) if -(-n // 64) <= gpu.processors // 2 else Tile(64, 64, 4)
    else:
        t = Tile(128, 128, 8) if wide else Tile(64, 128, 4)
    while 2 * stage_bytes(t, tile_k) > gpu.shared_bytes:
        t = t._replace(block_m=t.block_m // 2)
    stages = min(t.num_stages, gpu.shared_bytes // stage_bytes(t, tile_k))
    # for many tokens, GPUs before Hopper keep the unpacked weights in shared memory, too, beside all stages of x but one
    stages = min(stages, 1 + (gpu.shared_bytes - 2 * t.block_n * tile_k) // stage_bytes(t, tile_k))
    blocks, steps = -(-n // t.block_n) * -(-m // t.block_m), -(-k // tile_k)
    per_processor = 2 if m > 16 or not (wide or deep) else 6 if wide else 4
    wanted = -(-per_processor * gpu.processors // blocks) if m <= 16 or (m <= 128 and 2 * blocks <= 3 * gpu.processors) else 1
    if 128 < m <= 256:
        wanted = round(2 * gpu.processors / blocks)  # parts of so many sums cost more than a processor that waits
    split = max(s for s in SPLITS if s <= max(1, min(wanted, steps // 2)))
    return t._replace(num_stages=stages, split_k=split, early=t.early and gpu.early)


OPTIONS = {  # of each field: what `tune` tries, and tables may hold
    "block_n": (64, 128), "block_m": (16, 32, 64, 128, 256), "num_warps": (4, 8), "split_k": SPLITS, "num_stages": (2, 3, 4, 5),
    "sums": (True, False), "early": (False, True), "raster": (1, 4, 8, 16), "step": (1, 2), "registers": (0, 72, 80, 96, 128, 168),
}  # fmt: skip


def choose_for(format: QuantFormat, n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """The tile that was found by tuning, or `choose_by_shape`."""
    return tables.tile_for(KERNEL.name, choose_by_shape(format, n, k, m, gpu), OPTIONS, gpu, format.name, n, k, m)


def choose_by_shape(format: QuantFormat, n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """`choose`, for a weight in `format`."""
    what, groups = layout.held(format), layout.groups_per_tile(format, n, k)
    heavy = what.zero == "min" or what.columns > 0
    return choose(n, k, m, layout.tile_columns(format), gpu, mode(format, n, k, True), what.zero != "none", groups, heavy)


@functools.lru_cache(maxsize=4096)
def choose_invariant(format: QuantFormat, n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """`choose`, under the condition that every sum is formed in the same order at every m.

    What makes up that order is the split of K and the place of the scales, which are those of a few rows; the width of a tile is free.
    """
    few = choose_by_shape(format, n, k, 16, gpu)
    t = choose_by_shape(format, n, k, m if m <= 128 else 512, gpu)  # in between, and above, tiles may be too wide for scales on sums
    return t._replace(split_k=few.split_k, sums=True)


def stage_bytes(t: Tile, tile_k: int) -> int:
    """Shared memory of one stage of the pipeline, with some for scales."""
    return 2 * t.block_m * tile_k + 8 * t.block_n


def prepare(q: QuantTensor) -> Packed:
    """`layout.prepare`; and what a launch keeps on the device is made before any CUDA graph is."""
    if q.codes.is_cuda:
        reserve(q.codes.device)
        table(q.format.code, q.codes.device)
    return layout.prepare(q)


# -- launching ------------------------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor,
    weight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    tensor_scale: Tensor | None,
    bias: Tensor | None,
    format: str,
    n: int,
    batch_invariant: bool = False,
) -> Tensor:
    """x [..., K] -> [..., N]."""
    what, stored = formats.get(format), Stored(weight, scales, zeros, tensor_scale)
    check(x, weight, weight.shape[0] * layout.tile_columns(what))

    return over_rows(x, n, lambda rows, out: (_invariant if batch_invariant else multiply)(rows, stored, bias, what, out))


def multiply(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias, the faster way."""
    by_slices = x.dtype == torch.float32 or x.shape[0] >= TOKENS_FUSED
    (by_rows if by_slices else fused)(x, stored, bias, format, out)


def _invariant(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias, each row as if it were alone."""
    if x.dtype == torch.float32:
        raise UnsupportedError("no kernel multiplies float32 activations batch-invariantly on a GPU", {"x.dtype": FLOAT32})
    (m, k), n, gpu = x.shape, out.shape[1], gpu_of(x.device)
    tile = choose_invariant(format, n, k, m, gpu)
    if tile.split_k == 1 or m <= ROWS_INVARIANT:
        return fused(x, stored, bias, format, out, tile)
    for rows, part in zip(x.split(ROWS_INVARIANT), out.split(ROWS_INVARIANT)):
        fused(rows, stored, bias, format, part, choose_invariant(format, n, k, len(rows), gpu))
    return None


class Launch(NamedTuple):
    """What a call needs besides its tensors, once it has been worked out."""

    compiled: Any
    grid: tuple[int, int, int]
    tile: Tile
    table: Tensor | None
    values: tuple[Any, ...]  # the compile-time constants


_LAUNCHES: dict[tuple[Any, ...], Launch] = {}


def fused(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor, tile: Tile | None = None) -> None:
    """out [M, N] = x [M, K] · Ŵᵀ + bias in one kernel; a tile of one's own is for tuning.

    From arguments to a compiled kernel Triton takes longer than most products do; what it finds is kept, by all that it depends on.
    """
    (m, k), n = x.shape, out.shape[1]
    key = (format, n, k, m, x.dtype, x.device, None if bias is None else bias.dtype, tile)
    launch = _LAUNCHES.get(key) if regular(x, *stored, bias) else None
    if launch is None:
        return _first_launch(key, x, stored, bias, format, out, tile)
    stream = torch._C._cuda_getCurrentRawStream(x.device.index)
    parts, counters = workspace(launch.tile.split_k, m, n, launch.grid[0], x.device, stream)
    arguments = (x, *stored, launch.table, bias, out, parts, counters, m, n, k, k)
    launch.compiled[launch.grid](*arguments, *launch.values, stream=stream)
    return None


def _first_launch(
    key: tuple[Any, ...], x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor, tile: Tile | None
) -> None:
    """Choose, compile and launch; keep what was worked out, if the arguments are as they usually are."""
    from qkernels.kernels.triton.jit import f16_gemm as jit

    (m, k), n = x.shape, out.shape[1]
    t = tile or choose_for(format, n, k, m, gpu_of(x.device))
    grid = (-(-n // t.block_n) * -(-m // t.block_m), t.split_k, 1)
    entries = table(format.code, x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    parts, counters = workspace(t.split_k, m, n, grid[0], x.device, stream)
    arguments = (x, *stored, entries, bias, out, parts, counters, m, n, k, x.stride(0))
    named = tile_constants(format, n, k, x.dtype, x.device, t)
    values = tuple(named[name] for name in jit.gemm.arg_names[len(arguments) :])
    compiled = jit.gemm[grid](*arguments, *values, **compile_options(t))
    if x.is_cuda and regular(x, *stored, bias):
        remember(_LAUNCHES, key, Launch(compiled, grid, t, entries, values))


def compile_options(t: Tile) -> dict[str, Any]:
    """What Triton is told besides the constants."""
    options: dict[str, Any] = {"num_warps": t.num_warps, "num_stages": t.num_stages}
    return options | ({"launch_pdl": True} if t.early else {}) | ({"maxnreg": t.registers} if t.registers else {})


def tile_constants(format: QuantFormat, n: int, k: int, dtype: torch.dtype, device: torch.device, t: Tile) -> dict[str, Any]:
    """All compile-time constants of `gemm`."""
    return {
        **constants(format, n, k),
        **arithmetic(format, dtype, device),
        "REST": rest_needed(format, dtype),
        "MODE": mode(format, n, k, t.sums),
        "EVEN_K": k % layout.tile_columns(format) == 0,
        "BLOCK_N": t.block_n,
        "BLOCK_M": t.block_m,
        "SPLIT_K": t.split_k,
        "RASTER": t.raster,
        "STEP": t.step,
        "LAST": lanes_last(),
        "EARLY": t.early,
    }


# -- the ops and the kernel -----------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define(
    "triton_f16_gemm(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, Tensor? bias, str format, int n"
    ", bool batch_invariant=False) -> Tensor"
)


def _run_fake(x, weight, scales, zeros, tensor_scale, bias, format, n, batch_invariant=False):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], n))


_LIBRARY.impl("triton_f16_gemm", _run, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::triton_f16_gemm", _run_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int], batch_invariant: bool = False) -> Matmul:
    op, name, n = torch.ops.qkernels.triton_f16_gemm.default, format.name, shape[0]
    return gathered(lambda x, *tensors: op(x, *tensors, name, n, batch_invariant))


def run(x: Tensor, packed: Packed, bias: Tensor | None, batch_invariant: bool = False) -> Tensor:
    return bind(packed.format, packed.shape, batch_invariant)(x, *packed[2:], bias)


def why_not_format(p: Problem) -> str | None:
    """What the layout, or the op, cannot take."""
    if reason := layout.why_not(p):
        return reason
    if not formats.is_known(p.format):
        return f"the name {p.format.name}, by which its op takes a format, finds another one or none: register the format"
    return None


def _why_not(p: Problem) -> str | None:
    return why_not(p) or why_not_format(p)


FLOAT32 = "float32 goes through torch's matmul, of which the order of sums is not known; give bfloat16 or float16"


def _why_not_invariant(p: Problem) -> str | None:
    return _why_not(p) or (FLOAT32 if p.dtype == torch.float32 else None)


def _cost(p: Problem) -> float:
    """A launch, and reading at some 3 TB/s or multiplying at some 600 TFLOP/s."""
    return 4.0 + max(p.format.nbytes(p.n, p.k) / 3e6, 2 * p.rows * p.n * p.k / 6e8)


KERNEL = register(
    Kernel(
        name="triton_f16_wN_gemm",
        backend="triton",
        source=__doc__.rpartition("Source: ")[2],
        compute="float",
        why_not=_why_not,
        cost=_cost,
        prepare=prepare,
        restore=restore,
        rows=layout.rows,
        run=run,
        bind=bind,
        packed_type=Packed,
        dequantize=dequantize,
        backward=backward,
    )
)
INVARIANT = register(
    replace(
        KERNEL,
        name="triton_f16_wN_gemm_invariant",
        why_not=_why_not_invariant,
        cost=lambda p: 1.2 * _cost(p),  # a guess: one split for all M, and no way through torch's matmul
        run=functools.partial(run, batch_invariant=True),
        bind=functools.partial(bind, batch_invariant=True),
        batch_invariant=True,
    )
)
