"""What can be read off the Triton kernels without a GPU: compiled for one, its registers, shared memory and machine code.

`python -m benchmarks static --write` makes the table `results/static/triton.md`, to be looked at where a change of the kernels changes it.
"""

from __future__ import annotations

import collections
import functools
import itertools
import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qkernels import formats
from qkernels.formats import QuantFormat
from qkernels.kernels.triton import f16_backward, f16_gemm, int8, layout, s8_gemm, s8_w4_gemm
from qkernels.kernels.triton.launch import Gpu, begins_early

KIB = 1 << 10
SHARED = {80: 163 * KIB, 86: 99 * KIB, 89: 99 * KIB, 90: 227 * KIB, 100: 227 * KIB, 120: 99 * KIB}  # bytes that a block may have
MATRIX = ("HGMMA", "IGMMA", "HMMA", "IMMA", "UTCHMMA", "UTCIMMA")
POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16"}
SCALES = {"f16": "*fp16", "bf16": "*bf16", "f32": "*fp32", "e4m3": "*u8", "e8m0": "*u8", "i8": "*i8", "u8": "*u8", "u4": "*u8"}
CASES = tuple(
    (name, n, m)
    for name in ("int3", "int4", "int4_g32", "int5", "int6", "nf4", "mxfp4", "int8", "fp8", "q4_0", "q4_k", "q6_k")
    for n, m in ((4096, 1), (28672, 1), (4096, 64), (4096, 1024))
)
W4_CASES = ("int4", "int4_asym", "int4_g64", "int4_g-1")


Code = list[tuple[str, str]]  # of every line of machine code (name, the whole instruction); or a label and no instruction


def tool(name: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """Return what one of NVIDIA's tools says, of those that Triton brings along."""
    import triton

    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return subprocess.run([path, *arguments], cwd=cwd, capture_output=True, text=True, check=True).stdout


def parse(disassembly: str) -> Code:
    """Read what `nvdisasm -c` says."""
    lines = []
    for line in disassembly.splitlines():
        if m := re.match(r"(\.L_x_\d+):", line):
            lines.append((m[1], ""))
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][A-Z0-9_]*)(.*?);", line):
            lines.append((m[1], m[1] + m[2]))
    return lines


def matrix_loop(code: Code, names: tuple[str, ...] = MATRIX) -> Code:
    """Return the instructions of the shortest loop that has a matrix instruction, or others; none where there is no such loop."""
    labels = {name: at for at, (name, instruction) in enumerate(code) if not instruction}
    loops = []
    for at, (name, instruction) in enumerate(code):
        target = re.search(r"(\.L_x_\d+)", instruction)
        start = labels.get(target[1], at) if name == "BRA" and target else at
        loop = [line for line in code[start : at + 1] if line[1]]
        if {line[0] for line in loop} & set(names):
            loops.append(loop)
    return min((loop for loop in loops if len(loop) > 1), key=len, default=[])


@dataclass(frozen=True)
class Built:
    """A compiled kernel, and how many weights a thread multiplies in one turn of its loop."""

    compiled: Any
    weights: float
    tile: Any

    def resources(self) -> tuple[int, int]:
        """(registers of a thread, bytes of its stack)."""
        text = self._tool("cuobjdump", "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", text)
        assert found is not None, text
        return int(found[1]), int(found[2])

    @functools.cached_property
    def code(self) -> Code:
        """All lines of machine code; `nvdisasm` takes longer than many a compilation."""
        return parse(self._tool("nvdisasm", "-c", "--no-dataflow"))  # which would tell where indirect branches go

    def instructions(self) -> dict[str, list[str]]:
        """Name -> instructions of that name."""
        found: dict[str, list[str]] = collections.defaultdict(list)
        for name, instruction in self.code:
            if instruction:
                found[name].append(instruction)
        return found

    def loop(self) -> list[str]:
        """Names of the instructions of the shortest loop that has a matrix instruction; none where there is no such loop."""
        return [name for name, _ in matrix_loop(self.code)]

    def _tool(self, name: str, *options: str) -> str:
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(self.compiled.asm["cubin"])
            file.flush()
            return tool(name, *options, file.name)


def compiled_for(sm: int, kernel: Any, types: dict[str, str | None], constants: dict[str, Any], **options: Any) -> Any:
    """Compile for a GPU; pointers and integers are multiples of 16, but for M."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {arg: types.get(arg) or "constexpr" for arg in kernel.arg_names}
    values = {(i,): constants.get(arg) for i, arg in enumerate(signature) if signature[arg] == "constexpr"}
    sixteen = {(i,): [["tt.divisibility", 16]] for i, arg in enumerate(signature) if signature[arg] != "constexpr" and arg != "M"}
    source = ASTSource(kernel, signature=signature, constexprs=values, attrs=sixteen)
    return triton.compile(source, target=GPUTarget("cuda", sm, 32), options=options)


def build_f16(
    name: str,
    m: int,
    sm: int,
    dtype: torch.dtype = torch.bfloat16,
    n: int = 4096,
    k: int = 4096,
    choose: Callable[..., f16_gemm.Tile] = f16_gemm.choose_for,
) -> Built:
    """The kernel for x [m, k] and a weight [n, k], with the tile that is chosen for it."""
    from qkernels.kernels.triton.jit.f16_gemm import gemm

    f = formats.get(name)
    t = choose(f, n, k, m, Gpu(132, SHARED[sm], begins_early(sm // 10)))
    types = {**_types(f, dtype, t.split_k), "p_x": POINTERS[dtype], "p_bias": None, "stride_x": "i32"}
    constants = f16_gemm.tile_constants(f, n, k, dtype, torch.device("cuda"), t)
    compiled = compiled_for(sm, gemm, types, constants, **f16_gemm.compile_options(t))
    return Built(compiled, t.block_n * layout.tile_columns(f) * t.step / (32 * t.num_warps), t)


def build_backward(name: str, m: int, sm: int, dtype: torch.dtype = torch.bfloat16, n: int = 4096, k: int = 4096) -> Built:
    """The kernel for the gradient of x [m, k], and a weight [n, k]."""
    from qkernels.kernels.triton.jit.f16_backward import gemm

    f = formats.get(name)
    t = f16_backward.choose(n, k, m, layout.tile_columns(f), Gpu(132, SHARED[sm], begins_early(sm // 10)))
    types = {**_types(f, dtype, t.split_n), "p_y": POINTERS[dtype], "stride_y": "i32"}
    constants = f16_backward.tile_constants(f, n, k, dtype, torch.device("cuda"), t)
    compiled = compiled_for(sm, gemm, types, constants, num_warps=t.num_warps, num_stages=t.num_stages)
    return Built(compiled, t.block_n * layout.tile_columns(f) / (32 * t.num_warps), t)


def _types(f: QuantFormat, dtype: torch.dtype, parts: int) -> dict[str, str | None]:
    """Of the arguments that products with 16-bit activations share."""
    what, split = layout.held(f), parts > 1
    scale, outer = SCALES[what.scale], "*fp16" if what.zero == "none" else "*i32"
    minimum = None if what.scale == "u4" else scale
    return {
        "p_w": "*i32", "p_s": scale, "p_z": {"none": None, "int": "*u8", "float": scale, "min": minimum}[what.zero],
        "p_tensor_scale": outer if what.columns else "*fp32" if f.tensor_scale else None,
        "p_table": "*fp32" if layout.is_table(f.code) else None,
        "p_out": POINTERS[dtype], "p_part": "*fp32" if split else None, "p_count": "*i32" if split else None,
        "M": "i32", "N": "i32", "K": "i32",
    }  # fmt: skip


def build_s8(m: int, sm: int, n: int = 4096, k: int = 4096) -> Built:
    """The product in int8, with all that a call may bring along."""
    from qkernels.kernels.triton.jit.s8_gemm import gemm

    t = s8_gemm.choose(n, k, m, Gpu(132, SHARED[sm], begins_early(sm // 10)))
    types: dict[str, str | None] = {
        "p_x": "*i8", "p_rows": "*fp32", "p_w": "*i8", "p_s": "*fp32", "p_z": "*u8", "p_bias": "*bf16", "p_out": "*bf16",
        "p_part": "*i32" if t.split_k > 1 else None, "p_count": "*i32" if t.split_k > 1 else None, "M": "i32", "N": "i32", "padded": "i32",
    }  # fmt: skip
    compiled = compiled_for(sm, gemm, types, s8_gemm.tile_constants(t), num_warps=t.num_warps, num_stages=t.num_stages)
    return Built(compiled, t.block_n * s8_gemm.TILE_K / (32 * t.num_warps), t)


def build_s8_w4(name: str, m: int, sm: int, n: int = 4096, k: int = 4096, tile: int8.Tile | None = None) -> Built:
    """The product of codes of 4 bits in int8, with the tile that is chosen for it or another."""
    from qkernels.kernels.triton.jit.s8_w4_gemm import gemm

    f = formats.get(name)
    t, values = (
        tile or s8_w4_gemm.choose_for(f, n, k, m, Gpu(132, SHARED[sm], begins_early(sm // 10))),
        s8_w4_gemm.constants(f, n, k, assembly=True),
    )
    part = ("*i32" if values["ROW"] else "*fp32") if t.split_k > 1 else None
    types: dict[str, str | None] = {
        "p_x": "*i8", "p_rows": "*fp32", "p_w": "*u8", "p_s": SCALES[f.scale], "p_z": "*u8" if f.zero == "int" else None,
        "p_bias": "*bf16", "p_out": "*bf16", "p_part": part, "p_count": "*i32" if part else None, "M": "i32", "N": "i32", "padded": "i32",
    }  # fmt: skip
    options = {"num_warps": t.num_warps, "num_stages": t.num_stages}
    compiled = compiled_for(sm, gemm, types, {**values, **s8_w4_gemm.tile_constants(t)}, **options)
    return Built(compiled, t.block_n * values["TILE_K"] / (32 * t.num_warps), t)


def rows() -> Iterator[list[str]]:
    """One row per kernel, format, shape and GPU."""
    for sm in SHARED:
        for name, n, m in CASES if sm == 90 else [case for case in CASES if case[0] == "int4"]:
            yield _row("triton_f16_wN_gemm", name, n, m, sm, build_f16(name, m, sm, n=n))
        for m in (64, 256):
            yield _row("triton_f16_wN_gemm, gradient", "int4", 4096, m, sm, build_backward("int4", m, sm))
        for m in (1, 64, 1024):
            yield _row("triton_s8_w8_gemm", "int8", 4096, m, sm, build_s8(m, sm))
        for name, m in itertools.product(W4_CASES if sm == 90 else W4_CASES[:1], (1, 64, 1024)):
            yield _row("triton_s8_w4_gemm", name, 4096, m, sm, build_s8_w4(name, m, sm))


def _row(kernel: str, name: str, n: int, m: int, sm: int, built: Built) -> list[str]:
    registers, stack = built.resources()
    code = built.instructions()
    matrix = ", ".join(f"{len(code[i])} {i}" for i in MATRIX if code[i])
    t = built.tile
    parts = t.split_n if isinstance(t, f16_backward.Tile) else t.split_k
    shape = f"{t.block_n}×{t.block_m}, {t.num_warps} warps, {parts} parts, {t.num_stages} stages"
    loop = len(built.loop())
    per_weight = f"{loop / built.weights:.2f}" if loop else "–"
    return [
        f"sm_{sm}",
        kernel,
        name,
        f"{n}×4096",
        str(m),
        shape,
        str(registers),
        str(stack),
        f"{built.compiled.metadata.shared / KIB:.0f}",
        matrix,
        per_weight,
    ]


def markdown() -> str:
    """The table; compiling all of it takes a minute."""
    import triton

    head = [
        "GPU",
        "Kernel",
        "Format",
        "N×K",
        "M",
        "Tile",
        "Registers",
        "Stack, bytes",
        "Shared, KiB",
        "Matrix instructions",
        "Instructions a weight",
    ]
    rule = ["---"] * len(head)
    lines = ["| " + " | ".join(cells) + " |" for cells in (head, rule, *rows())]
    note = "bf16 activations; run on sm_90 alone. Instructions: of the loop over K, a thread"
    return f"Compiled with Triton {triton.__version__}, {note}.\n\n" + "\n".join(lines)
