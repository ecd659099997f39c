"""How busy others keep the machine while we measure."""

from __future__ import annotations

import os
from pathlib import Path

QUIET = 0.05  # share of the CPUs that others may use during a measurement
LEAST_SECONDS = 0.5  # of CPU time over all CPUs: the system counts in ticks of 10 ms


class Neighbours:
    """How much of the CPUs others used since this object was made: other processes, and other tenants of the host (steal)."""

    def __init__(self) -> None:
        self._start = self._seconds()

    def share(self) -> float | None:
        """Share of all CPU time, 0…1; None where the system does not tell, or when too little time has passed."""
        now = self._seconds()
        if self._start is None or now is None or now[0] - self._start[0] < LEAST_SECONDS:
            return None
        total, busy, own = (after - before for after, before in zip(now, self._start))
        return max(0.0, busy - own) / total

    @staticmethod
    def _seconds() -> tuple[float, float, float] | None:
        """(all, busy, our own) CPU seconds so far, over all CPUs."""
        if not os.path.exists("/proc/stat"):
            return None
        ticks = [int(t) / os.sysconf("SC_CLK_TCK") for t in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        times = os.times()
        own = times.user + times.system + times.children_user + times.children_system
        idle = ticks[3] + ticks[4]  # idle, waiting for input and output
        return sum(ticks), sum(ticks) - idle, own
