"""Build qkernels/_C.abi3.so, the CPU kernels, against the LibTorch stable ABI: one binary for every torch >= 2.10.

A build that fails does not fail the install: the package then computes with its slow reference kernel, and `qkernels info`
repeats the reason, which is kept in qkernels/_build_info.json. These environment variables are read here, and only here:

    QKERNELS_CPU=0        do not build
    QKERNELS_CPU=1        a failure is fatal
    QKERNELS_EMULATE=1    the AVX-512 levels in plain C++ (csrc/emulated): slow, for tests on machines without those instructions
    CXX                   the compiler; c++ without it (GCC or Clang: the flags are theirs)
    CFLAGS, CXXFLAGS, QKERNELS_CXXFLAGS    appended, in this order, when compiling and when linking (sanitizers, -g)
"""

import hashlib
import json
import os
import platform
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

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
if sys.platform == "linux" and X86 and not EMULATE:  # elsewhere nothing asks the system to save its registers
    LEVELS["level_amx"] = LEVELS["level_avx512bf16"] + ["-mamx-tile", "-mamx-int8"]
EMULATED = [level for level in LEVELS if "avx512" in level] if EMULATE else []
for level in EMULATED:  # -O3 takes five times as long to compile; what -m would define stays defined
    defines = [f"-D__{flag.removeprefix('-m').upper()}__" for flag in LEVELS[level] if flag.startswith("-mavx512")]
    LEVELS[level] = ["-Icsrc/emulated", "-O1", "-Wno-psabi", *defines]
FLAGS = [
    *("-std=c++20", "-O3", "-DNDEBUG", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    "-fno-math-errno",  # lets sqrt and the like become instructions; -ffast-math would break inf and nan
    "-ffp-contract=off",  # a product and a sum become one rounding where the source says fma, and nowhere else: every level rounds alike
    "-DTORCH_TARGET_VERSION=0x020a000000000000",  # 2.10: an API newer than that is a compile error
    *(["-DQKERNELS_X86"] if X86 else []),
    *(["-DQKERNELS_EMULATE"] if EMULATE else []),
    "-Icsrc",
]


def sources() -> list[str]:
    """Return the sources that this machine can compile, relative to the repository."""
    levels = [level for level in LEVELS if X86 or level in ("level_portable", *EMULATED)]
    found = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
    return [str(p.relative_to(ROOT)) for p in found if p.stem in levels or not p.stem.startswith("level_")]


class BuildPython(build_py):
    """Leave out the tests that lie among the benchmark's modules: `qkernels bench` needs none."""

    def find_package_modules(self, package: str, package_dir: str) -> list[tuple[str, str, str]]:
        return [found for found in super().find_package_modules(package, package_dir) if not found[1].startswith(("test_", "conftest"))]


class BuildKernels(build_ext):
    """Build the library with our own few lines: setuptools has no flags per file, no threads, and no notion of headers."""

    def run(self) -> None:
        package = (ROOT if self.inplace else Path(self.build_lib).resolve()) / "qkernels"
        package.mkdir(parents=True, exist_ok=True)
        try:
            info = build(package / "_C.abi3.so")
        except (RuntimeError, OSError) as error:
            if os.environ.get("QKERNELS_CPU") == "1":
                raise
            info = {"cpu_extension": False, "reason": str(error)}
            (package / "_C.abi3.so").unlink(missing_ok=True)  # one of an earlier build would not fit today's Python side
            self.extensions = []  # nothing to pack
            print(f"\nWARNING: qkernels installs WITHOUT its CPU kernels: {error}\n", file=sys.stderr)
        (package / "_build_info.json").write_text(json.dumps(info, indent=2) + "\n")


def build(library: Path) -> dict[str, object]:
    """Compile what has changed, link the library, and describe it; raise RuntimeError with the reason when that cannot be."""
    if os.environ.get("QKERNELS_CPU") == "0":
        raise RuntimeError("QKERNELS_CPU=0 was set when the package was installed")
    try:
        import torch
        from torch.utils.cpp_extension import include_paths, library_paths
    except ImportError as error:
        raise RuntimeError(f"torch cannot be imported ({error}); install torch first, then qkernels with --no-build-isolation") from error
    compiler = shlex.split(os.environ.get("CXX") or "c++")
    asked = [flag for name in ("CFLAGS", "CXXFLAGS", "QKERNELS_CXXFLAGS") for flag in shlex.split(os.environ.get(name, ""))]
    common = [*FLAGS, *(f"-isystem{path}" for path in include_paths()), *asked]
    version = run([*compiler, "--version"]).splitlines()[0]

    # Objects live in the repository, not in pip's temporary folder, so that the next build finds them; one folder for each set of flags.
    key = hashlib.sha256(repr((version, torch.__version__, common, LEVELS)).encode()).hexdigest()[:12]
    folder = ROOT / "build" / f"objects-{key}"
    folder.mkdir(parents=True, exist_ok=True)
    headers = max((p.stat().st_mtime for p in (ROOT / "csrc").rglob("*.h")), default=0.0)

    def compile_one(source: str) -> str:
        stem = Path(source).stem
        out = folder / f"{stem}.o"
        if not out.exists() or out.stat().st_mtime <= max((ROOT / source).stat().st_mtime, headers):
            run([*compiler, *common, *LEVELS.get(stem, []), "-c", source, "-o", str(out)])
        return str(out)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        objects = list(pool.map(compile_one, sources()))
    # No rpath: libtorch_cpu is in the process already, as torch is what loads this library.
    linking = [*asked, *(f"-L{path}" for path in library_paths()), "-ltorch_cpu"]
    fresh = library.with_suffix(".fresh")
    run([*compiler, "-shared", *objects, *linking, "-o", str(fresh)])
    fresh.replace(library)  # at one stroke: a process that has the old one open keeps it whole
    levels = [level.removeprefix("level_") for level in LEVELS if any(Path(s).stem == level for s in sources())]
    return {"cpu_extension": True, "reason": None, "compiler": version, "torch": torch.__version__, "levels": levels, "flags": asked}


def run(command: list[str]) -> str:
    """Run a compiler from the repository root and return what it prints; its first complaint becomes the error."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise RuntimeError(f"the compiler {command[0]} cannot be run: {error.strerror}") from error
    print(done.stderr, file=sys.stderr, end="")
    if done.returncode:
        complaint = next((line for line in done.stderr.splitlines() if "error" in line), f"exit status {done.returncode}")
        raise RuntimeError(f"the compiler {command[0]} failed: {complaint}")
    return done.stdout


setup(
    # The benchmark lies at the repository's top, where nothing of ours imports it; in site-packages its name would not be ours to take.
    packages=[*find_packages(include=["qkernels*"]), *(f"qkernels.{name}" for name in find_packages(include=["benchmarks*"]))],
    package_dir={"qkernels.benchmarks": "benchmarks"},
    ext_modules=[Extension("qkernels._C", sources(), py_limited_api=True)],
    cmdclass={"build_py": BuildPython, "build_ext": BuildKernels},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},  # the library calls no Python at all
)
