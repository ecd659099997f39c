"""What can be read off the CUDA kernels without a GPU: registers, and the machine code of the loop over K, from the compiled library.

`make cuda` compiles and prints it; `python -m benchmarks static --write` makes the table `results/static/cuda.md`.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import qkernels
from qkernels.kernels import compiled

from .static import MATRIX, Code, matrix_loop, parse, tool

PRODUCTS = (*MATRIX, "IDP")  # and dp4a
LIBRARY = Path(qkernels.__file__).parent / "_CUDA.abi3.so"
HEAD = [
    "Kernel",
    "Template arguments",
    "GPU",
    "Registers",
    "Stack, bytes",
    "Static shared, bytes",
    "Spills: loop, elsewhere",
    "Products",
    "Instructions of the loop",
]


@dataclass(frozen=True)
class Kernel:
    """One kernel of the library for one architecture; registers are those of a thread at its start, before setmaxnreg."""

    source: str  # csrc/cuda/<source>.cu
    arguments: tuple[str, ...]  # of the template, in the order in which its name has them
    architecture: str  # "8.0"; "9.0a"
    registers: int
    stack: int
    shared: int
    code: Code

    def loop(self) -> list[str]:
        """Instructions of the loop over K, if the kernel has matrix instructions or dp4a."""
        return [instruction for _, instruction in matrix_loop(self.code, PRODUCTS)]

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
    with tempfile.TemporaryDirectory() as folder:
        tool("cuobjdump", "-xelf", "all", LIBRARY, cwd=Path(folder))
        found = [kernel for cubin in Path(folder).glob("*.cubin") for kernel in kernels_of(cubin)]
    return sorted(found, key=lambda kernel: (kernel.source, len(kernel.architecture), kernel.architecture, kernel.arguments))


def kernels_of(cubin: Path) -> Iterator[Kernel]:
    """Those for one GPU, of one source."""
    digits, suffix = re.findall(r"\.sm_(\d+)([af]?)\.cubin$", cubin.name)[0]
    usage = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+)", tool("cuobjdump", "-res-usage", cubin))
    functions = re.split(r"^\s*\.section\s+\.text\.([^,\s]+),.*$", tool("nvdisasm", "-c", cubin), flags=re.MULTILINE)[1:]
    code = dict(zip(functions[::2], functions[1::2]))
    for mangled, *resources in usage:
        source, arguments = described(mangled)
        yield Kernel(source, arguments, f"{digits[:-1]}.{digits[-1]}{suffix}", *map(int, resources), parse(code[mangled]))


def described(mangled: str) -> tuple[str, tuple[str, ...]]:
    """The source, and the template's arguments: names of classes, numbers, 0 and 1; in this order in the kernel's mangled name."""
    source, found, depth, at = "", [], 0, 2
    while at < len(mangled):
        if number := re.compile(r"\d+").match(mangled, at):
            at = number.end() + int(number[0])
            name = mangled[number.end() : at]
            if made := re.search(r"_\d+_([a-z]\w*?)_cu_[0-9a-f]+", name):
                source = made[1]
            elif name != "qk":
                found.append(name)
        elif literal := re.compile(r"L(?:[a-z]|N.*?E|\d+[A-Za-z]+)(n?\d+)E").match(mangled, at):
            found.append(literal[1])
            at = literal.end()
        elif other := re.compile(r"S[0-9A-Z]*_").match(mangled, at):  # a name that was there before
            at = other.end()
        else:
            depth += {"N": 1, "I": 1, "E": -1}.get(mangled[at], 0)
            at += 1
            if depth == 0:
                break
    assert source, f"not one of our kernels: {mangled}"
    return source, tuple(found[1:])


def row(kernel: Kernel) -> list[str]:
    """A kernel's line of the table."""
    loop, spills = kernel.loop(), len(kernel.all_of("LDL", "STL"))
    inside = count(loop, "LDL", "STL")
    products = ", ".join(f"{count(loop, name)} {name}" for name in PRODUCTS if count(loop, name))
    return [
        kernel.source,
        ", ".join(kernel.arguments),
        kernel.architecture,
        str(kernel.registers),
        str(kernel.stack),
        str(kernel.shared),
        f"{inside}, {spills - inside}",
        products or "–",
        str(len(loop) or "–"),
    ]


def markdown() -> str:
    """The table. Raises: FileNotFoundError where the library is missing."""
    lines = ["| " + " | ".join(cells) + " |" for cells in (HEAD, ["---"] * len(HEAD), *(row(kernel) for kernel in kernels()))]
    note = (
        "Registers: of a thread at its start; on Hopper, those that multiply take more, from those that copy. Shared memory is given to a\n"
        "launch, but for the static part. Spills, and instructions: of a thread, where there is a loop over K with products, of a warp or\n"
        "by dp4a (IDP)."
    )
    return f"{compiled.built()['cuda_compiler']}.\n{note}\n\n" + "\n".join(lines)


if __name__ == "__main__":
    print(markdown())
