"""The CUDA kernels without a GPU: csrc/cuda compiled for the host over tests/cuda_emulation, and calls of its operators on the CPU."""

import ctypes
import functools
import itertools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils.cpp_extension import include_paths

from qkernels import reference
from qkernels.kernels.triton import layout, s8_gemm, s8_w4_gemm
from qkernels.testing import assert_matmul_close

ROOT = Path(__file__).parents[1]
EMULATION = ROOT / "tests" / "cuda_emulation"
FLAGS = ["-std=c++20", "-O1", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
FLAGS += ["-fstack-reuse=none"]  # variables are a GPU's registers: products read them after their scope has ended
FLAGS += ["-fno-strict-aliasing", "-U_FORTIFY_SOURCE"]  # CUDA's casts; longjmp from one fibre's stack to another's
FLAGS += ["-Wall", "-Wno-unknown-pragmas", "-Wno-attributes", "-Wno-parentheses", "-Wno-unused", "-Werror"]
INCLUDE = [f"-I{EMULATION}", *(flag for path in include_paths() for flag in ("-isystem", path))]
LINK = ["-Wl,--no-as-needed", "-ltorch_cpu"]  # by name alone: see `begun`
_COUNT = itertools.count()


class Emulated(NamedTuple):
    """A compiled source: its operators; what orders the threads; where to put what the kernel before a launch writes late."""

    ops: Any
    set_seed: Any
    set_late: Any


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


def compile(*arguments):
    done = subprocess.run(["g++", *FLAGS, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@functools.lru_cache(maxsize=1)
def begun():
    """The folder of what all sources have in common, which goes when this process ends: their first headers, the machine, and an empty
    library of torch's name: reading its own takes the linker longer than all else, and what is loaded is found in this process anyway."""
    folder = tempfile.TemporaryDirectory()
    header, machine, torchs = (Path(folder.name) / name for name in ("begin.h", "machine.o", "libtorch_cpu.so"))
    header.write_text('#include "cuda/hopper.cuh"\n#include <torch/csrc/stable/tensor.h>\n')
    compile(*INCLUDE, "-xc++-header", header, "-o", f"{header}.gch")
    compile("-c", EMULATION / "machine.cpp", "-o", machine)
    compile("-shared", f"-Wl,-soname,{torchs.name}", "-xc++", "/dev/null", "-o", torchs)
    return folder


def compile_begin(folder):
    """Bring what `build` wants into a folder."""
    for path in Path(begun().name).iterdir():
        (folder / path.name).symlink_to(path)


def build(source, folder, changes=()):
    """Compile csrc/cuda/<source>.cu, after `compile_begin`; changes: (file, old, new), made in a copy of the sources."""
    name = f"emulated_{next(_COUNT)}"
    csrc = folder / name
    for part in ("common", "cuda"):
        shutil.copytree(ROOT / "csrc" / part, csrc / part)
    for file, old, new in changes:
        text = (csrc / "cuda" / file).read_text()
        assert text.count(old) == 1, f"{file} has {text.count(old)} times: {old}"
        (csrc / "cuda" / file).write_text(text.replace(old, new))
    unit, library = folder / f"{name}.cpp", folder / f"{name}.so"
    unit.write_text(f'#include "begin.h"\n#define EMULATED_AS {name}\n#include "cuda/{source}.cu"\n')
    compile("-shared", *INCLUDE, f"-I{csrc}", unit, folder / "machine.o", f"-L{folder}", *LINK, "-o", library)
    torch.ops.load_library(library)
    loaded = ctypes.CDLL(str(library))
    loaded.set_late.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
    return Emulated(getattr(torch.ops, name), loaded.set_seed, loaded.set_late)


def quantize(x, padded):
    """What s8_quantize.cu gives: codes int8 [M, padded], and of every row the scale and the sum of codes, float32 [2, M]."""
    amax = x.float().abs().amax(1)
    usable, most = (amax > 3.0e-36) & amax.isfinite(), torch.full_like(amax, 127)
    inverse = torch.where(usable, most / amax, 0).double()[:, None]  # torch's 127 / amax is 127 · (1 / amax)
    codes = torch.where(usable[:, None], (x.double() * inverse).round(), 0).to(torch.int8)
    scales = torch.where(usable, amax / most, torch.where(amax.isfinite(), 0.0, torch.nan))
    return F.pad(codes, (0, padded - x.shape[1])), torch.stack([scales, codes.sum(1).float()])


def late(emulated, written):
    """A tensor that gets its numbers when the kernel before the next launch ends."""
    garbage = torch.full_like(written, 77)
    emulated.set_late(garbage.data_ptr(), written.data_ptr(), written.nbytes)
    return garbage


def call(emulated, kind, q, x, bias, case):
    """Launch an operator between canaries, and return what it gives; parts are garbage, flags have to be 0 again."""
    group, steps = q.format.group_extent(*q.shape)[1], -(-case.k // 128)
    per_scale = 1 << 30 if group == case.k else max(1, group // 128)
    around = torch.full((3, case.m, case.n), torch.nan, dtype=x.dtype)
    parts = None if case.whole else torch.full((case.blocks * 128 * case.tokens,), torch.nan)
    flags = torch.zeros(case.blocks, dtype=torch.int32)
    how = (case.tokens, case.blocks, case.raster, case.whole, True, 0)
    written = [F.pad(x, (0, 8), value=torch.nan)] if kind == "w4" else quantize(x, 128 * steps)
    inputs = [late(emulated, tensor) for tensor in written]
    if kind == "w4":
        inputs[0] = inputs[0][:, : case.k]
    prepare, more = {
        "w4": (layout.prepare, (8, per_scale)),
        "s8_w8": (s8_gemm.prepare, ()),
        "s8_w4": (s8_w4_gemm.prepare, (per_scale,)),
    }[kind]
    packed = prepare(q)
    weight = (packed.weight, packed.scales, packed.zeros)
    getattr(emulated.ops, f"{kind}_wgmma")(*inputs, *weight, bias, around[1], parts, flags, *more, *how)
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
