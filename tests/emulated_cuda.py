"""The Hopper kernels without a GPU: csrc/cuda compiled for the host over tests/cuda_emulation, and calls of its operators on the CPU."""

import ctypes
import itertools
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.cpp_extension import include_paths, library_paths

from qkernels import reference
from qkernels.kernels.triton import layout, s8_gemm, s8_w4_gemm
from qkernels.testing import assert_matmul_close

ROOT = Path(__file__).parents[1]
FLAGS = ["-std=c++20", "-O1", "-DNDEBUG", "-fPIC", "-shared", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-fstack-reuse=none"]  # variables are a GPU's registers: products read them after their scope has ended
FLAGS += ["-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]  # CUDA's casts; longjmp from one fibre's stack to another's
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-parentheses", "-Wno-unused", "-Werror"]
_COUNT = itertools.count()


class Emulated(NamedTuple):
    """A compiled source: its operators, and the seed that threads are scheduled by."""

    ops: Any
    set_seed: Any


class Case(NamedTuple):
    """A product, and how a launch cuts it."""

    n: int
    m: int
    k: int
    tokens: int
    whole: bool
    blocks: int
    raster: int = 2


def why_not():
    """Why nothing can be compiled here."""
    if sys.platform != "linux" or shutil.which("g++") is None:
        return "the emulation is written for Linux and GCC"
    probe = subprocess.run(["g++", "-std=c++20", "-fsyntax-only", "-xc++", "-"], input="_Float16 f;", text=True, capture_output=True)
    return "this GCC has no _Float16" if probe.returncode else None


def build(source, folder, changes=()):
    """Compile csrc/cuda/<source>.cu; changes: (file, old, new), made in a copy of the sources."""
    name = f"emulated_{next(_COUNT)}"
    csrc = folder / name
    shutil.copytree(ROOT / "csrc" / "cuda", csrc / "cuda")
    for file, old, new in changes:
        text = (csrc / "cuda" / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
        (csrc / "cuda" / file).write_text(text.replace(old, new))
    include = [f"-I{ROOT / 'tests' / 'cuda_emulation'}", f"-I{csrc}", *(flag for path in include_paths() for flag in ("-isystem", path))]
    link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    library = folder / f"{name}.so"
    command = ["g++", *FLAGS, f"-DEMULATED_AS={name}", *include, "-xc++", str(csrc / "cuda" / f"{source}.cu"), "-o", str(library), *link]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    torch.ops.load_library(library)
    return Emulated(getattr(torch.ops, name), ctypes.CDLL(str(library)).set_seed)


def quantize(x, padded):
    """Codes of x int8 [M, padded], and of every row the scale and the sum of codes, float32 [2, M]: jit/int8.py, in torch."""
    amax = x.float().abs().amax(1)
    codes = F.pad((x.float() * (127 / amax)[:, None]).round().to(torch.int8), (0, padded - x.shape[1]))
    return codes, torch.stack([amax / 127, codes.sum(1).float()])


def call(emulated, kind, q, x, bias, case):
    """Launch an operator between canaries, and return what it gives; parts are garbage, flags have to be 0 again."""
    group, steps = q.format.group_extent(*q.shape)[1], -(-case.k // 128)
    per_scale = 1 << 30 if group == case.k else max(1, group // 128)
    around = torch.full((3, case.m, case.n), torch.nan, dtype=x.dtype)
    parts = None if case.whole else torch.full((case.blocks * 128 * case.tokens,), torch.nan)
    flags = torch.zeros(case.blocks, dtype=torch.int32)
    how = (case.tokens, case.blocks, case.raster, case.whole, True, 0)
    if kind == "w4":
        packed = layout.prepare(q)
        emulated.ops.w4_wgmma(x, packed.weight, packed.scales, packed.zeros, bias, around[1], parts, flags, 8, per_scale, *how)
    else:
        packed = (s8_gemm if kind == "s8_w8" else s8_w4_gemm).prepare(q)
        operands = (*quantize(x, 128 * steps), packed.weight, packed.scales, packed.zeros, bias, around[1], parts, flags)
        emulated.ops.s8_w8_wgmma(*operands, *how) if kind == "s8_w8" else emulated.ops.s8_w4_wgmma(*operands, per_scale, *how)
    assert not flags.any(), "flags are left raised"
    assert around[0].isnan().all() and around[2].isnan().all(), "results beside their place"
    return around[1].clone()


def check(emulated, kind, q, x, bias, case, seeds):
    """Against fp64, and the same bits with every seed."""
    weight = reference.decode(q, torch.float64)
    first = None
    for seed in seeds:
        emulated.set_seed(seed)
        y = call(emulated, kind, q, x, bias, case)
        if first is None:
            assert_matmul_close(y, x, weight, bias, int8=None if kind == "w4" else q, act_group=None)
            first = y
        assert torch.equal(y, first), f"other bits with seed {seed}"
