"""What a format means to the kernels of 16-bit activations: the tensors of a packed weight, and constants to compile for."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from qkernels.formats import Int, QuantFormat
from qkernels.formats.format import Code
from qkernels.kernels.triton import layout
from qkernels.kernels.triton.unpack_asm import base, unpack_asm


class Stored(NamedTuple):
    """The tensors of a packed weight, but for the permutation."""

    weight: Tensor
    scales: Tensor
    zeros: Tensor | None
    tensor_scale: Tensor | None


def constants(format: QuantFormat, n: int, k: int) -> dict[str, Any]:
    """The compile-time constants that a format and a shape decide, but for those of the activations' type."""
    tile_k, (rows, group) = layout.tile_columns(format), format.group_extent(n, k)
    code, scale, zero, columns = layout.held(format)
    return {
        "BITS": code.bits,
        "TILE_K": tile_k,
        "WORDS": layout.words_per_row(format),
        "CODE": "table" if layout.is_table(code) else "int" if isinstance(code, Int) else code.name,
        "SCALE": scale,
        "ZERO": zero,
        "BASE": float(base(code) - (code.bias if isinstance(code, Int) else 0)),
        "GROUP_ROWS": 1 << 30 if rows == n > 1 else rows,
        "GROUP_TILES": 1 << 30 if group == k else max(1, group // tile_k),
        "PER_TILE": layout.groups_per_tile(format, n, k),
        "OUTER_TILES": columns // tile_k,
    }


def mode(format: QuantFormat, n: int, k: int, sums: bool) -> str:
    """Where the kernel applies scales: once to a row's sums, to those of every tile, or, as minima always are, to the weights."""
    group = format.group_extent(n, k)[1]
    if layout.held(format).zero == "min":
        return "word"
    if group == k and not layout.held(format).columns:
        return "row"
    return "sum" if sums and group % layout.tile_columns(format) == 0 else "word"


@functools.lru_cache(maxsize=64)
def table(code: Code, device: torch.device) -> Tensor | None:
    if not layout.is_table(code):
        return None
    return torch.tensor(code.values, dtype=torch.float32, device=device)


def rest_needed(format: QuantFormat, dtype: torch.dtype) -> bool:
    """Whether a scale has more bits than activations of `dtype` hold."""
    exact = {
        torch.float16: ("f16", "e4m3"),
        torch.bfloat16: ("bf16", "e4m3", "e8m0"),
        torch.float32: ("f32", "f16", "bf16", "e4m3", "e8m0", "i8", "u8", "u4"),
    }
    return layout.held(format).scale not in exact[dtype]


def arithmetic(format: QuantFormat, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The constants that the activations' type and the GPU decide."""
    import triton.language as tl

    if device.type == "cpu" or dtype == torch.float32:  # the interpreter, which has no products of bf16
        return {"ASM": None, "DTYPE": tl.float32}
    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {"ASM": _asm(layout.held(format).code, dtype), "DTYPE": types[dtype]}


@functools.lru_cache(maxsize=256)
def _asm(code: Code, dtype: torch.dtype) -> str:
    return unpack_asm(code, dtype)


def why_not_bias(format: QuantFormat) -> str | None:
    """What kernels cannot read that take one zero point of all codes for granted."""
    if isinstance(format.code, Int) and format.zero == "none" and format.code.bias != base(format.code):
        return f"code {format.code.name}: without zero points, integers of {format.bits} bits have the bias {base(format.code)}"
    return None
