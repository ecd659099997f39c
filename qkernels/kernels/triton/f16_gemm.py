"""fp16 and bf16 activations against codes of 2 to 6 and of 8 bits: one tensor-core kernel from decoding to prefill.

The dequantised weight is the left operand of the tensor core's product, which on Hopper comes straight from registers; tokens are its
columns, in multiples of 16. Sums are float32; a split of K adds its parts in a fixed order, so a result is the same on every run.
Many rows, and float32 activations, go through `dequantize` and torch's matmul, a slice of the weight at a time.

Layout: see layout.py.

Source: weights as the left operand from registers: Machete and humming; the order of codes after Marlin's; magic-number unpacking as in
FasterTransformer; grouped rasterisation from Triton's tutorials. Written from scratch.
"""

from __future__ import annotations

import functools
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels import formats
from qkernels.formats import Int, QuantFormat, QuantTensor
from qkernels.formats.format import Code
from qkernels.kernels.registry import Kernel, Matmul, Problem, register
from qkernels.kernels.triton import layout
from qkernels.kernels.triton.launch import SPLITS, Gpu, check, gpu_of, over_rows, regular, remember, reserve, why_not, workspace
from qkernels.kernels.triton.layout import Packed, restore
from qkernels.kernels.triton.unpack_asm import base, unpack_asm

SLICE_BYTES = 32 << 20  # of dequantised weight at a time: what the caches of large GPUs hold
TOKENS_FUSED = 2048  # from here on, dequantising the weight costs less than torch's matmul gains


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


def choose(n: int, k: int, m: int, tile_k: int, gpu: Gpu, where: str = "sum", zeros: bool = False) -> Tile:
    """The tile for x [m, k] and a weight [n, k]: the best of a sweep on an H100 (benchmarks/NOTES.md), by classes of shapes.

    Whatever the tile, two blocks or more on every processor are wanted: while one unpacks weights, the other multiplies.
    where: the `mode`; scales on the weights, and zero points, take registers.
    """
    plain = where != "word" and not zeros
    wide = -(-n // 64) >= 2 * gpu.processors  # enough rows to fill the GPU without splitting K
    deep = k >= 8192
    if m <= 16 and wide:  # as many blocks as fit: what is on its way bounds the bandwidth
        t = Tile(64, 16, 4, early=True, registers=(72 if plain else 80) if gpu.early and tile_k <= 128 else 0)
    elif m <= 16:
        t = Tile(64, 16, 4, early=True, step=2) if deep else Tile(128, 16, 8, early=True)
    elif m <= 32:
        t = Tile(128, 32, 4, early=True) if deep and not wide and where == "sum" and not zeros else Tile(64, 32, 4, early=True)
    elif m <= 64:
        t = Tile(128, 64, 8, early=True) if wide else Tile(64, 64, 4)
    elif m <= 128:
        t = Tile(64, 128, 4) if plain and (wide or deep) else Tile(64, 64, 4)
    elif m > 512 or (m <= 256 and wide):
        t = Tile(128, 256, 8, sums=False)
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


def choose_for(format: QuantFormat, n: int, k: int, m: int, gpu: Gpu) -> Tile:
    """`choose`, for a weight in `format`."""
    return choose(n, k, m, layout.tile_columns(format), gpu, mode(format, n, k, True), format.zero != "none")


def stage_bytes(t: Tile, tile_k: int) -> int:
    """Shared memory of one stage of the pipeline, with some for scales."""
    return 2 * t.block_m * tile_k + 8 * t.block_n


def prepare(q: QuantTensor) -> Packed:
    """`layout.prepare`; and what a launch keeps on the device is made before any CUDA graph is."""
    if q.codes.is_cuda:
        reserve(q.codes.device)
        _table(q.format.code, q.codes.device)
    return layout.prepare(q)


# -- what a format means to the kernels -----------------------------------------------------------------------------------------------


def constants(format: QuantFormat, n: int, k: int) -> dict[str, Any]:
    """The compile-time constants that a format and a shape decide, but for those of the activations' type."""
    tile_k, (rows, group) = layout.tile_columns(format), format.group_extent(n, k)
    return {
        "BITS": format.bits,
        "TILE_K": tile_k,
        "WORDS": layout.words_per_row(format),
        "CODE": "table" if layout.is_table(format.code) else "int" if isinstance(format.code, Int) else format.code.name,
        "SCALE": format.scale,
        "ZERO": format.zero,
        "BASE": float(base(format.code) - (format.code.bias if isinstance(format.code, Int) and format.zero == "float" else 0)),
        "GROUP_ROWS": 1 << 30 if rows == n > 1 else rows,
        "GROUP_TILES": 1 << 30 if group == k else max(1, group // tile_k),
        "PER_TILE": layout.groups_per_tile(format, n, k),
    }


def mode(format: QuantFormat, n: int, k: int, sums: bool) -> str:
    """Where the kernel applies scales: once to a row's sums, to those of every tile, or to the weights."""
    group = format.group_extent(n, k)[1]
    if group == k:
        return "row"
    return "sum" if sums and group % layout.tile_columns(format) == 0 else "word"


@functools.lru_cache(maxsize=64)
def _table(code: Code, device: torch.device) -> Tensor | None:
    if not layout.is_table(code):
        return None
    return torch.tensor(code.values, dtype=torch.float32, device=device)


def rest_needed(format: QuantFormat, dtype: torch.dtype) -> bool:
    """Whether a scale has more bits than activations of `dtype` hold."""
    exact = {
        torch.float16: ("f16", "e4m3"),
        torch.bfloat16: ("bf16", "e4m3", "e8m0"),
        torch.float32: ("f32", "f16", "bf16", "e4m3", "e8m0"),
    }
    return format.scale not in exact[dtype]


# -- launching ------------------------------------------------------------------------------------------------------------------------


def _run(
    x: Tensor, weight: Tensor, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None, bias: Tensor | None, format: str, n: int
) -> Tensor:
    """x [..., K] -> [..., N]."""
    what, stored = formats.get(format), Stored(weight, scales, zeros, tensor_scale)
    check(x, weight, weight.shape[0] * layout.tile_columns(what))

    def multiply(rows: Tensor, out: Tensor) -> None:
        by_slices = x.dtype == torch.float32 or rows.shape[0] >= TOKENS_FUSED
        (_by_slices if by_slices else fused)(rows, stored, bias, what, out)

    return over_rows(x, n, multiply)


class Stored(NamedTuple):
    """The tensors of a packed weight, but for the permutation."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None


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
    table = _table(format.code, x.device)
    stream = torch.cuda.current_stream(x.device).cuda_stream if x.is_cuda else 0
    parts, counters = workspace(t.split_k, m, n, grid[0], x.device, stream)
    arguments = (x, *stored, table, bias, out, parts, counters, m, n, k, x.stride(0))
    named = tile_constants(format, n, k, x.dtype, x.device, t)
    values = tuple(named[name] for name in jit.gemm.arg_names[len(arguments) :])
    compiled = jit.gemm[grid](*arguments, *values, **compile_options(t))
    if x.is_cuda and regular(x, *stored, bias):
        remember(_LAUNCHES, key, Launch(compiled, grid, t, table, values))


def compile_options(t: Tile) -> dict[str, Any]:
    """What Triton is told besides the constants."""
    options: dict[str, Any] = {"num_warps": t.num_warps, "num_stages": t.num_stages}
    return options | ({"launch_pdl": True} if t.early else {}) | ({"maxnreg": t.registers} if t.registers else {})


def tile_constants(format: QuantFormat, n: int, k: int, dtype: torch.dtype, device: torch.device, t: Tile) -> dict[str, Any]:
    """All compile-time constants of `gemm`."""
    return {
        **constants(format, n, k),
        **_arithmetic(format, dtype, device),
        "REST": rest_needed(format, dtype),
        "MODE": mode(format, n, k, t.sums),
        "EVEN_K": k % layout.tile_columns(format) == 0,
        "BLOCK_N": t.block_n,
        "BLOCK_M": t.block_m,
        "SPLIT_K": t.split_k,
        "RASTER": t.raster,
        "STEP": t.step,
        "LAST": _lanes_last(),
        "EARLY": t.early,
    }


def _by_slices(x: Tensor, stored: Stored, bias: Tensor | None, format: QuantFormat, out: Tensor) -> None:
    """Dequantise some rows of the weight, multiply, go on in the same memory."""
    k, n = x.shape[1], out.shape[1]
    rows = min(n, max(128, SLICE_BYTES // (k * x.itemsize) // 128 * 128))
    buffer = torch.empty((rows, k), dtype=x.dtype, device=x.device)
    for first in range(0, n, rows):
        w = buffer[: min(rows, n - first)]
        _dequantize_rows(stored, format, (n, k), first, w)
        part = slice(first, first + len(w))
        if bias is None:
            torch.mm(x, w.t(), out=out[:, part])
        else:
            torch.addmm(bias[part].to(x.dtype), x, w.t(), out=out[:, part])


def _dequantize_rows(stored: Stored, format: QuantFormat, shape: tuple[int, int], first: int, out: Tensor) -> None:
    """Rows first… of the weight [N, K], as many as `out` has."""
    from qkernels.kernels.triton.jit import f16_gemm as jit

    (n, k), block_n = shape, 64
    exact = torch.float32 if layout.is_table(format.code) else torch.float16  # which holds all codes, but not all tables' values
    arithmetic = _arithmetic(format, exact, out.device)
    jit.dequantize[(-(-len(out) // block_n), stored.weight.shape[0])](
        *stored, _table(format.code, out.device), out, first, len(out), n, k,
        **constants(format, n, k), **arithmetic, BLOCK_N=block_n, num_warps=4,
    )  # fmt: skip


def _arithmetic(format: QuantFormat, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The constants that the activations' type and the GPU decide."""
    import triton.language as tl

    if device.type == "cpu" or dtype == torch.float32:  # the interpreter, which has no products of bf16
        return {"ASM": None, "DTYPE": tl.float32}
    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {"ASM": _asm(format, dtype), "DTYPE": types[dtype]}


@functools.lru_cache(maxsize=256)
def _asm(format: QuantFormat, dtype: torch.dtype) -> str:
    return unpack_asm(format.code, dtype)


@functools.lru_cache(maxsize=1)
def _lanes_last() -> bool:
    """Which axis of equal rank Triton gives to lanes first: it changed."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 9)


# -- the ops and the kernel -----------------------------------------------------------------------------------------------------------

_LIBRARY = torch.library.Library("qkernels", "FRAGMENT")
_LIBRARY.define(
    "triton_f16_gemm(Tensor x, Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, Tensor? bias, str format, int n)"
    " -> Tensor"
)
_LIBRARY.define("triton_dequantize(Tensor weight, Tensor scales, Tensor? zeros, Tensor? tensor_scale, str format, int n, int k) -> Tensor")


def _run_fake(x, weight, scales, zeros, tensor_scale, bias, format, n):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], n))


def _dequantize(weight: Tensor, scales: Tensor, zeros: Tensor | None, tensor_scale: Tensor | None, format: str, n: int, k: int) -> Tensor:
    out = torch.empty((n, k), dtype=torch.float32, device=weight.device)
    with torch.cuda.device(weight.device) if weight.is_cuda else nullcontext():
        _dequantize_rows(Stored(weight, scales, zeros, tensor_scale), formats.get(format), (n, k), 0, out)
    return out


def _dequantize_fake(weight, scales, zeros, tensor_scale, format, n, k):  # type: ignore[no-untyped-def]
    return weight.new_empty((n, k), dtype=torch.float32)


_LIBRARY.impl("triton_f16_gemm", _run, "CompositeExplicitAutograd")
_LIBRARY.impl("triton_dequantize", _dequantize, "CompositeExplicitAutograd")
torch.library.register_fake("qkernels::triton_f16_gemm", _run_fake, lib=_LIBRARY)
torch.library.register_fake("qkernels::triton_dequantize", _dequantize_fake, lib=_LIBRARY)


def bind(format: QuantFormat, shape: tuple[int, int]) -> Matmul:
    op, name, n = torch.ops.qkernels.triton_f16_gemm.default, format.name, shape[0]

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
        return op(x, weight, scales, zeros, tensor_scale, bias, name, n)

    return matmul


def run(x: Tensor, packed: Packed, bias: Tensor | None) -> Tensor:
    return bind(packed.format, packed.shape)(x, *packed[2:], bias)


def dequantize(packed: Packed) -> Tensor:
    """[N, K] float32 from the packed form."""
    format, (n, k), weight, scales, zeros, tensor_scale, perm = packed
    w = torch.ops.qkernels.triton_dequantize(weight, scales, zeros, tensor_scale, format.name, n, k)
    return w if perm is None else torch.empty_like(w).index_copy_(1, perm.long(), w)


def _why_not(p: Problem) -> str | None:
    if reason := why_not(p) or layout.why_not(p):
        return reason
    if isinstance(p.format.code, Int) and p.format.zero == "none" and p.format.code.bias != base(p.format.code):
        return f"code {p.format.code.name}: without zero points, integers of {p.format.bits} bits have the bias {base(p.format.code)}"
    if not formats.is_known(p.format):
        return f"the name {p.format.name}, by which its op takes a format, finds another one or none: register the format"
    return None


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
        run=run,
        bind=bind,
        packed_type=Packed,
        dequantize=dequantize,
    )
)
