"""What a result depends on: CPU, caches, memory, versions, commit, and the measured limits of the machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields, replace
from datetime import datetime, timezone
from pathlib import Path

from .base import Arithmetic
from .neighbours import QUIET, Neighbours

FLAGS_OF_INTEREST = re.compile(r"avx2|f16c|avx_vnni\w*|avx512(f|bw|vl|_vnni|_bf16|_fp16|vbmi|_vbmi2)|gfni|amx_\w+|asimddp|i8mm|bf16|sve2?")
PACKAGES = ("qkernels", "torch", "zentorch", "onnxruntime", "openvino", "bitsandbytes", "numpy")
ROOT = Path(__file__).resolve().parents[1]  # of the checkout; in a wheel, the package


@dataclass(frozen=True)
class Roofline:
    """Measured limits: reading memory in GB/s, arithmetic in 10⁹ operations a second (a multiply-add is two)."""

    read_gbs: float
    int8_gops: float
    bf16_gflops: float | None  # None: the CPU has no bf16 products, fp32 takes their place
    fp32_gflops: float
    level: str

    def peak(self, arithmetic: Arithmetic) -> float:
        """10⁹ operations a second of one kind."""
        by_kind = {"int8": self.int8_gops, "bf16": self.bf16_gflops or self.fp32_gflops, "fp32": self.fp32_gflops}
        return by_kind[arithmetic]

    def limit_us(self, nbytes: int, ops: int, arithmetic: Arithmetic) -> float:
        """The least time for reading `nbytes` and doing `ops` operations, whichever takes longer."""
        return max(nbytes / (self.read_gbs * 1e3), ops / (self.peak(arithmetic) * 1e3))

    def best_of(self, other: Roofline) -> Roofline:
        """The higher of two measurements in everything: other work on the machine only ever lowers them."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self) if f.name != "level"}
        return replace(self, **{name: None if None in pair else max(pair) for name, pair in pairs.items()})


def measure_roofline(threads: int) -> Roofline:
    """Measure with the library's own kernels. Raises ImportError or QKernelsError where they are not compiled."""
    from qkernels.kernels.cpu import roofline

    r = roofline.measure(threads=threads)
    return Roofline(r.read_gbs, r.int8_gops, r.bf16_gflops, r.fp32_gflops, r.level)


def try_roofline(threads: int, before: Roofline | None = None, tries: int = 5) -> tuple[Roofline | None, str]:
    """The best of `before` and of new measurements, which are repeated until one was not disturbed by others.

    Returns (None, why) where nothing can be measured: times are worth having without the limits.
    """
    best = before
    try:
        for _ in range(tries):
            neighbours = Neighbours()
            now = measure_roofline(threads)
            best = now if best is None else best.best_of(now)
            if (neighbours.share() or 0.0) < QUIET:
                break
    except Exception as error:
        return None, f"{type(error).__name__}: {error}"
    return best, ""


def reader(nbytes: int) -> Callable[[], object] | None:
    """A function that reads `nbytes` of memory with all threads; None where the kernels are not compiled."""
    from qkernels.kernels.cpu import library, roofline

    return None if library.why_missing() else roofline.reader(nbytes)


def last_level_cache_bytes() -> int:
    """Size of the largest cache that the first CPU sees; 0 when the system does not tell."""
    units = {"K": 1 << 10, "M": 1 << 20}
    sizes = [p.read_text().strip() for p in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(s[:-1]) * units[s[-1]] for s in sizes if s[-1:] in units), default=0)


def describe_machine() -> dict:
    """CPU model, instruction sets, cores, caches and memory (bytes)."""
    cpuinfo = Path("/proc/cpuinfo").read_text() if os.path.exists("/proc/cpuinfo") else ""
    model = re.search(r"^model name\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    flags = re.search(r"^(?:flags|Features)\s*:\s*(.+)$", cpuinfo, re.MULTILINE)
    isa = sorted(f for f in set(flags[1].split()) if FLAGS_OF_INTEREST.fullmatch(f)) if flags else []
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    name = model[1] if model else platform.processor() or platform.machine()
    cache = last_level_cache_bytes()
    return {"cpu": name, "isa": isa, "cores": os.cpu_count(), "cache_bytes": cache, "memory_bytes": memory, "system": platform.system()}


def versions() -> dict[str, str]:
    """Installed versions of qkernels, torch and the peers, without importing them."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str:
    """The source tree's commit, with `+` when files differ from it; "unknown" outside a git checkout of ours."""
    if not (ROOT / ".git").exists():  # git would go up and find the repository that an environment lies in
        return "unknown"
    try:
        head = _git("rev-parse", "HEAD").strip()
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no").strip() else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def command(argv: list[str]) -> str:
    """The command line without paths of this machine; `qkernels bench` runs the same code."""
    program = ["qkernels"] if Path(argv[0]).stem == "qkernels" else ["python", "-m", "benchmarks"]
    return shlex.join([*program, *argv[1:]])


def provenance(threads: int) -> dict:
    """All that a reader needs to judge or repeat a result."""
    return {
        "machine": describe_machine(),
        "versions": versions(),
        "commit": commit(),
        "command": command(sys.argv),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "threads": threads,
    }


def as_dict(roofline: Roofline | None) -> dict | None:
    return None if roofline is None else asdict(roofline)


def slug() -> str:
    """A file name for this machine's results: the CPU's model in lower case."""
    name = re.sub(r"\((r|tm)\)|processor|cpu|@.*", "", describe_machine()["cpu"].lower())
    return re.sub(r"[^a-z0-9]+", "-", name).strip("-") or "machine"
