"""The libraries that qkernels is measured against, one file each, and how to find out which of them work here.

`ALL` lists every peer; torch's own kernels come first and are always there. A library may be missing, may crash on this CPU or may
compute nonsense on it, so each one is first tried on a small layer in a process of its own (`probe.py`).
"""

from __future__ import annotations

import importlib.util
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from ..base import Contestant
from . import aten, bnb, ggml, ort, ov, zen

TORCH: tuple[Contestant, ...] = aten.CONTESTANTS
OTHERS: tuple[Contestant, ...] = (*zen.CONTESTANTS, *ort.CONTESTANTS, *ov.CONTESTANTS, *bnb.CONTESTANTS, *ggml.CONTESTANTS)
ALL = TORCH + OTHERS

PROBE_TIMEOUT_S = 120


def select(names: str, known: Sequence[Contestant] = OTHERS) -> list[Contestant]:
    """Pick peers by `"all"`, `"none"`, or a comma-separated list of beginnings of their names or packages.

    Raises: ValueError when a part matches nothing.
    """
    if names in ("all", "none"):
        return list(known) if names == "all" else []
    parts = [part.strip().lower() for part in names.split(",") if part.strip()]
    for part in parts:
        if not any(_matches(peer, part) for peer in known):
            raise ValueError(f"no peer matches {part!r}; known: {', '.join(peer.name for peer in known)}")
    return [peer for peer in known if any(_matches(peer, part) for part in parts)]


def _matches(peer: Contestant, part: str) -> bool:
    return peer.name.lower().startswith(part) or (bool(peer.package) and peer.package.startswith(part))


def why_not(peer: Contestant, threads: int) -> str | None:
    """Say why a peer cannot be measured on this machine, or None when it can."""
    if reason := _why_absent(peer):
        return reason
    command = [sys.executable, "-m", f"{__name__}.probe", peer.name, str(threads)]
    root = Path(__file__).resolve().parents[__name__.count(".") + 1]  # there this package is found first, wherever the user is
    try:
        done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=PROBE_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"a small layer took over {PROBE_TIMEOUT_S} s"
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"crashes on this CPU ({signal.Signals(-done.returncode).name})"
    return _explanation(done.stdout, done.stderr)


def _why_absent(peer: Contestant) -> str:
    if peer.absent is not None:
        return peer.absent()
    return "" if importlib.util.find_spec(peer.package) else f"not installed (pip install {peer.distribution or peer.package})"


def _explanation(stdout: str, stderr: str) -> str:
    """The probe's verdict (its last line) and the first complaint of the library itself, if it printed one."""
    verdict = (stdout.strip().splitlines() or stderr.strip().splitlines() or ["failed without a word"])[-1]
    complaint = next((line.strip() for line in (stdout + stderr).splitlines() if "not supported" in line), "")
    return f"{verdict} [{complaint}]" if complaint and complaint not in verdict else verdict
