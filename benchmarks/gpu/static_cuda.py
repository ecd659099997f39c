"""What can be read off the CUDA kernels without a GPU: registers, and the machine code of the loop over K, from the compiled library.

`make cuda` compiles and prints it; `python -m benchmarks static --write` makes the table `results/static/cuda.md`.
"""

from __future__ import annotations

import json
import re
import tempfile
from dataclasses import dataclass
from pathlib import Path

import qkernels

from .static import MATRIX, Code, matrix_loop, parse, tool

PACKAGE = Path(qkernels.__file__).parent
LIBRARY = PACKAGE / "_CUDA.abi3.so"
WEIGHTS = 128 * 128 // 256  # of a thread in a step of K, one turn of the loop: 128 rows and columns; 256 threads multiply
NAMES = {("w4_wgmma", "W4"): "w4_wgmma", ("s8_wgmma", "W4"): "s8_w4_wgmma", ("s8_wgmma", "W8"): "s8_w8_wgmma"}
HEAD = [
    "Kernel",
    "Results",
    "Sums",
    "Tokens",
    "Registers",
    "Stack, bytes",
    "Spills: loop, elsewhere",
    "Matrix instructions",
    "Instructions a weight",
]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the library; registers are those of a thread at its start, before setmaxnreg."""

    name: str
    dtype: str
    by_step: bool  # scales belong to the sums of a step: int32 becomes float in the loop
    tokens: int
    registers: int
    stack: int
    code: Code

    def loop(self) -> list[str]:
        """Instructions of the loop over K."""
        return [instruction for _, instruction in matrix_loop(self.code)]

    def all_of(self, *names: str) -> list[str]:
        """Instructions of these names."""
        return [instruction for name, instruction in self.code if name in names and instruction]


def count(instructions: list[str], *names: str) -> int:
    """How many begin with one of these."""
    return sum(instruction.startswith(names) for instruction in instructions)


def kernels() -> list[Kernel]:
    """Those of the compiled library, by name. Raises: FileNotFoundError where it is missing."""
    if not LIBRARY.exists():
        raise FileNotFoundError(LIBRARY)
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", tool("cuobjdump", "-res-usage", LIBRARY))
    resources = {mangled: (int(registers), int(stack)) for mangled, registers, stack in usage}
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", LIBRARY, cwd=Path(folder))
        text = "".join(tool("nvdisasm", "-c", cubin) for cubin in sorted(Path(folder).glob("*.cubin")))
    functions = re.split(r"^\s*\.section\s+\.text\.([^,\s]+),.*$", text, flags=re.MULTILINE)[1:]
    found = [Kernel(*described(name), *resources[name], parse(code)) for name, code in zip(functions[::2], functions[1::2])]
    return sorted(found, key=lambda kernel: (kernel.name, kernel.dtype, kernel.by_step, kernel.tokens))


def described(mangled: str) -> tuple[str, str, bool, int]:
    """Name, type of the results, whether scales belong to steps, and tokens of a tile, from gemm's mangled name."""
    made = re.search(r"_\d+_([a-z]\w*?)_cu_[0-9a-f]+_\d+(W\d)I(.+?E)EEE", mangled)
    assert made is not None, f"not one of our kernels: {mangled}"
    types, flags, tokens = (re.findall(pattern, made[3]) for pattern in (r"NS_\d+(b?f16)E", r"Lb([01])E", r"Li(\d+)E"))
    wide = types == ["bf16"] or flags[:1] == ["1"]
    return NAMES[made[1], made[2]], "bf16" if wide else "fp16", flags[1:] == ["1"], int(tokens[0])


def row(kernel: Kernel) -> list[str]:
    """A kernel's line of the table."""
    loop, spills = kernel.loop(), len(kernel.all_of("LDL", "STL"))
    inside = count(loop, "LDL", "STL")
    matrix = ", ".join(f"{count(loop, name)} {name}" for name in MATRIX if count(loop, name))
    return [
        kernel.name,
        kernel.dtype,
        "float, by steps" if kernel.by_step else "float" if count(loop, "HGMMA") else "int32",
        str(kernel.tokens),
        str(kernel.registers),
        str(kernel.stack),
        f"{inside}, {spills - inside}",
        matrix,
        f"{len(loop) / WEIGHTS:.2f}",
    ]


def markdown() -> str:
    """The table. Raises: FileNotFoundError where the library is missing."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *(row(kernel) for kernel in kernels()))]
    compiler = json.loads((PACKAGE / "_build_info.json").read_text())["cuda_compiler"]
    note = (
        "Registers: of a thread at its start; those that multiply take more, from those that copy. Shared memory: as many stages as\n"
        "fit into 227 KiB, 12 at most. Spills: instructions. Matrix instructions, and instructions a weight: of the loop over K, a thread."
    )
    return f"{compiler}, for sm_90a.\n{note}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
