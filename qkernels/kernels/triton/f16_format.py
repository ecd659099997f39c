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
def table(code: Code, device: torch.device) -> Tensor | None:
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


def arithmetic(format: QuantFormat, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    """The constants that the activations' type and the GPU decide."""
    import triton.language as tl

    if device.type == "cpu" or dtype == torch.float32:  # the interpreter, which has no products of bf16
        return {"ASM": None, "DTYPE": tl.float32}
    types = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
    return {"ASM": _asm(format, dtype), "DTYPE": types[dtype]}


@functools.lru_cache(maxsize=256)
def _asm(format: QuantFormat, dtype: torch.dtype) -> str:
    return unpack_asm(format.code, dtype)
