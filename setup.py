"""Build the compiled kernels against the LibTorch stable ABI, one binary for every torch >= 2.10: qkernels/_C.abi3.so for CPUs and,
where there is CUDA's compiler, qkernels/_CUDA.abi3.so for NVIDIA's GPUs.

A build that fails does not fail the install: the package then computes with its other kernels, the slow reference if there is nothing
else, and `qkernels info` repeats the reason, which is kept in qkernels/_build_info.json. These environment variables are read here, and
only here:

    QKERNELS_CPU=0        do not build the CPU kernels
    QKERNELS_CPU=1        a failure is fatal
    QKERNELS_CUDA=0, =1   likewise for the CUDA kernels
    QKERNELS_EMULATE=1    the AVX-512 levels in plain C++ (csrc/emulated): slow, for tests on machines without those instructions
    CXX                   the compiler; c++ without it (GCC or Clang: the flags are theirs)
    CFLAGS, CXXFLAGS, QKERNELS_CXXFLAGS    appended, in this order, when compiling and when linking (sanitizers, -g); not for CUDA
    TORCH_CUDA_ARCH_LIST  the GPUs to compile for, as torch takes them: "8.0;9.0+PTX"; without it those of ARCHITECTURES
    CUDA_HOME             where bin/nvcc is; without it PATH and /usr/local/cuda are searched. nvcc reads others itself: NVCC_CCBIN, say
"""

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
X86 = platform.machine().lower() in ("x86_64", "amd64")
EMULATE = os.environ.get("QKERNELS_EMULATE") == "1"

AVX2 = ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mtune=haswell"]  # 5 percent faster than GCC 12's generic tuning, on Zen too
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512"]
AVX512 += ["-mtune=icelake-server"]  # likewise
AVX512 += ["-Wno-uninitialized", "-Wno-maybe-uninitialized"]  # GCC 12 warns of its own header: _mm512_undefined_ps
LEVELS = {  # source -> its own flags. No other source may hold such instructions: it runs before the CPU has been asked
    "level_portable": [],
    "level_avx2": AVX2,
    "level_avx512vnni": AVX2 + AVX512,
    "level_avx512bf16": AVX2 + AVX512 + ["-mavx512bf16", "-mavx512vbmi"],
}
if EMULATE or (sys.platform == "linux" and X86):  # elsewhere nothing asks the system to save its registers
    LEVELS["level_amx"] = LEVELS["level_avx512bf16"] + ["-mamx-tile", "-mamx-int8"]
EMULATED = [level for level in LEVELS if "avx512" in level or "amx" in level] if EMULATE else []
for level in EMULATED:  # -O3 takes five times as long to compile; what -m would define stays defined
    defines = [f"-D__{flag.removeprefix('-m').upper()}__" for flag in LEVELS[level] if flag.startswith("-mavx512")]
    LEVELS[level] = ["-Icsrc/emulated", "-O1", "-Wno-psabi", *defines]
COMMON = ["-std=c++20", "-O3", "-DNDEBUG", "-Icsrc", "-DTORCH_TARGET_VERSION=0x020a000000000000"]  # 2.10: a newer API is a compile error
FLAGS = [
    *COMMON,
    *("-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-fno-math-errno",  # lets sqrt and the like become instructions; -ffast-math would break inf and nan
    "-ffp-contract=off",  # a product and a sum become one rounding where the source says fma, and nowhere else: every level rounds alike
    *(["-DQKERNELS_X86"] if X86 else []),
    *(["-DQKERNELS_EMULATE"] if EMULATE else []),
]
CUDA_FLAGS = [*COMMON, "--expt-relaxed-constexpr", "-DUSE_CUDA", "-Xcompiler=-fPIC,-fvisibility=hidden"]
# What is compiled for one runs on later ones of the same major version: 8.0's on 8.6 and 8.9. The newest brings PTX for those to come.
ARCHITECTURES = ("7.5", "8.0", "9.0", "10.0", "12.0")
OLDEST = dict.fromkeys(("w4_gemv", "s8_gemv", "s8_quantize"), "7.5")  # the GPUs of a source; others need Ampere's copies, products
QUICK = ("dispatch", "ops", "quantize", "s8_quantize", "s8_wgmma", "w4_wgmma")  # sources that take seconds: last, to end on all cores
OLDEST_NVCC = (12, 5)  # has cudaGetDriverEntryPointByVersion


class Recipe(NamedTuple):
    """How a library is made of its sources, and what `_build_info.json` tells of it."""

    sources: list[str]
    compile: list[str]
    flags_of: dict[str, list[str]]  # a source's name -> flags of its own
    link: list[str]
    libraries: list[str]
    info: dict[str, Any]


class Part(NamedTuple):
    """A library of the package."""

    name: str
    kernels: str
    variable: str  # of the environment: "0" or "1"
    keys: tuple[str, str]  # in `_build_info.json`: whether it is there; why not
    sources: str  # a pattern
    recipe: Callable[[list[str]], Recipe]

    def all_sources(self) -> list[str]:
        """Return those that there are, relative to the repository."""
        return sorted(str(path.relative_to(ROOT)) for path in ROOT.glob(self.sources))


class BuildPython(build_py):
    """Leave out the tests that lie among the benchmark's modules: `qkernels bench` needs none."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if not found[1].startswith(("test_", "conftest"))]


class BuildKernels(build_ext):
    """Build the libraries with our own few lines: setuptools has no flags per file, no threads, no nvcc, and no notion of headers."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "qkernels"
        package.mkdir(parents=True, exist_ok=True)
        info: dict[str, Any] = {}
        with ThreadPoolExecutor() as parts, ThreadPoolExecutor(os.cpu_count()) as compilers:
            for found in parts.map(lambda part: attempt(part, package / f"{part.name}.abi3.so", compilers), PARTS):
                info |= found
        self.extensions = [made for made in self.extensions if (package / f"{made.name.removeprefix('qkernels.')}.abi3.so").exists()]
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def attempt(part: Part, library: Path, compilers: ThreadPoolExecutor) -> dict[str, Any]:
    """Build a library and describe it; where that cannot be, or is not wanted, say why."""
    there, reason = part.keys
    wanted = os.environ.get(part.variable)
    try:
        if wanted == "0":
            raise RuntimeError(f"{part.variable}=0 was set when the package was installed")
        recipe = part.recipe(part.all_sources())
        build(library, recipe, compilers)
    except (RuntimeError, OSError) as error:
        if wanted == "1":
            raise
        library.unlink(missing_ok=True)  # one of an earlier build would not fit today's Python side
        print(f"\nWARNING: qkernels installs WITHOUT its {part.kernels} kernels: {error}\n", file=sys.stderr)
        return {there: False, reason: str(error)}
    return {there: True, reason: None, **recipe.info}


def cpu(found: list[str]) -> Recipe:
    """Return how this machine compiles the CPU kernels; raise RuntimeError with the reason when it cannot."""
    torch = torch_build()
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    asked = [flag for name in ("CFLAGS", "CXXFLAGS", "QKERNELS_CXXFLAGS") for flag in shlex.split(os.environ.get(name, ""))]
    version = run([*compiler, "--version"]).splitlines()[0]
    levels = [level for level in LEVELS if X86 or level in ("level_portable", *EMULATED)]
    sources = [source for source in found if not (stem := Path(source).stem).startswith("level_") or stem in levels]
    info = {"compiler": version, "torch": torch.version, "levels": [level.removeprefix("level_") for level in levels], "flags": asked}
    return Recipe(sources, [*compiler, *FLAGS, *torch.include, *asked], LEVELS, [*compiler, "-shared"], [*asked, *torch.link], info)


def cuda(found: list[str]) -> Recipe:
    """Return how nvcc compiles the CUDA kernels, for which no GPU is needed; raise RuntimeError with the reason when it cannot."""
    home = os.environ.get("CUDA_HOME")
    nvcc = shutil.which("nvcc", path=f"{home}/bin" if home else f"{os.environ.get('PATH', '')}{os.pathsep}/usr/local/cuda/bin")
    if not nvcc:
        raise RuntimeError("there was no nvcc, CUDA's compiler, when the package was installed")
    version = next((line for line in run([nvcc, "--version"]).splitlines() if "release" in line), "")
    release = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if release < OLDEST_NVCC:
        raise RuntimeError(f"{nvcc} is too old: {version or 'of no known release'}; {'.'.join(map(str, OLDEST_NVCC))} or newer is wanted")
    torch = torch_build()
    wanted = architectures(run([nvcc, "--list-gpu-code"]))
    of = {stem: fitting for source in found if (fitting := for_source(stem := Path(source).stem, wanted))}
    sources = [source for source in found if Path(source).stem in of]
    info = {"torch": torch.version, "cuda_compiler": version, "cuda_architectures": of}
    link = [nvcc, "-shared", "-cudart=static", "--no-device-link"]
    return Recipe(sources, [nvcc, *CUDA_FLAGS, *torch.include], {s: gencodes(a) for s, a in of.items()}, link, torch.link, info)


def architectures(known: str) -> list[str]:
    """Return what the kernels are compiled for, oldest first: "8.0", or "9.0+PTX"; `known`: what nvcc says that it can."""
    of_nvcc = {f"{digits[:-1]}.{digits[-1]}" for digits in re.findall(r"sm_(\d+)", known)}
    asked = re.split(r"[;\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip())
    if asked == [""]:
        found = [one for one in ARCHITECTURES if one in of_nvcc]
        return [*found[:-1], f"{found[-1]}+PTX"]
    for one in asked:
        parts = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", one)
        if parts is None or parts[1] not in of_nvcc:
            raise RuntimeError(
                f"TORCH_CUDA_ARCH_LIST has {one!r}; numbers such as 8.0 or 9.0+PTX are taken, which nvcc knows: {known.split()}"
            )
    return sorted({re.sub("[af]", "", one) for one in asked}, key=version_of)


def for_source(stem: str, wanted: list[str]) -> list[str]:
    """Return those that a source is written for: Hopper alone, with its own instructions, or all from some on."""
    oldest = OLDEST.get(stem, "8.0")
    return ["9.0a"] if stem.endswith("_wgmma") else [one for one in wanted if version_of(one) >= version_of(oldest)]


def version_of(architecture: str) -> tuple[int, int, bool]:
    major, minor = re.findall(r"\d+", architecture)
    return int(major), int(minor), "PTX" in architecture


def gencodes(wanted: list[str]) -> list[str]:
    """Return nvcc's flags."""
    flags = []
    for one in wanted:
        digits, ptx, _ = one.replace(".", "").partition("+PTX")
        flags.append(f"-gencode=arch=compute_{digits},code={f'[sm_{digits},compute_{digits}]' if ptx else f'sm_{digits}'}")
    return flags


PARTS = [
    Part("_C", "CPU", "QKERNELS_CPU", ("cpu_extension", "reason"), "csrc/cpu/*.cpp", cpu),
    Part("_CUDA", "CUDA", "QKERNELS_CUDA", ("cuda_extension", "cuda_reason"), "csrc/cuda/*.cu", cuda),
]


class TorchBuild(NamedTuple):
    """What a compiler must know of torch."""

    version: str
    include: list[str]
    link: list[str]


def torch_build() -> TorchBuild:
    """Ask torch; raise RuntimeError where there is none."""
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise RuntimeError(f"torch cannot be imported ({error}); install torch first, then qkernels with --no-build-isolation") from error
    # No rpath: libtorch_cpu is in the process already, as torch is what loads our libraries.
    link = [*(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    return TorchBuild(torch.__version__, [flag for path in include_paths() for flag in ("-isystem", path)], link)


def build(library: Path, recipe: Recipe, compilers: ThreadPoolExecutor) -> None:
    """Compile what has changed, and link the library; raise RuntimeError with the compiler's complaint."""
    # Objects live in the repository, not in pip's temporary folder, so that the next build finds them; one folder for each set of flags.
    key = hashlib.sha256(repr((recipe.info, recipe.compile, recipe.flags_of)).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"objects-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    folders = {ROOT / source for source in map(os.path.dirname, recipe.sources)} | {ROOT / "csrc/common", ROOT / "csrc/emulated"}
    headers = max((p.stat().st_mtime for found in folders for p in found.glob("*.*h")), default=0.0)

    def compile_one(source: str) -> str:
        stem = Path(source).stem
        out = folder / f"{stem}.o"
        if not out.exists() or out.stat().st_mtime <= max((ROOT / source).stat().st_mtime, headers):
            run([*recipe.compile, *recipe.flags_of.get(stem, []), "-c", source, "-o", str(out)])
        return str(out)

    objects = list(compilers.map(compile_one, sorted(recipe.sources, key=lambda source: Path(source).stem in QUICK)))
    fresh = library.with_suffix(".fresh")
    run([*recipe.link, *objects, *recipe.libraries, "-o", str(fresh)])
    fresh.replace(library)  # at one stroke: a process that has the old one open keeps it whole


def run(command: list[str]) -> str:
    """Run a compiler from the repository root and return what it prints; its first complaint becomes the error."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"the compiler {command[0]} cannot be run: {error.strerror}") from error
    print(done.stderr, file=sys.stderr, end="")
    if done.returncode:
        complaint = next(
            (line for line in done.stderr.splitlines() if "error" in line or "fatal" in line), f"exit status {done.returncode}"
        )
        raise RuntimeError(f"the compiler {command[0]} failed: {complaint}")
    return done.stdout


setup(
    # The benchmark lies at the repository's top, where nothing of ours imports it; in site-packages its name would not be ours to take.
    packages=[*find_packages(include=["qkernels*"]), *(f"qkernels.{name}" for name in find_packages(include=["benchmarks*"]))],
    package_dir={"qkernels.benchmarks": "benchmarks"},
    ext_modules=[Extension(f"qkernels.{part.name}", part.all_sources(), py_limited_api=True) for part in PARTS],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # the libraries call no Python at all
)
