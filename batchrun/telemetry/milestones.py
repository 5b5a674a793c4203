"""When a run came how far: where the time before its first row and after its last one went."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

from batchrun.engine.protocol import EngineStats

NAMES = (
    "imported", "engine started", "planned", "cluster ready", "engine imported", "engine ready",
    "first row", "last row", "last commit", "manifest", "report",
)  # fmt: skip


class Milestones:
    """`seconds` from the start of the run to each of NAMES that it has reached, in that order.

    Args:
        started: when the run began, seconds since the epoch; by default now.
    """

    def __init__(self, started: float | None = None) -> None:
        self.started = time.time() if started is None else started
        self._reached: dict[str, float] = {}

    @classmethod
    def of_process(cls) -> Milestones:
        """From the start of this process: a command's user waits for its imports too."""
        # psutil counts from when the machine started, which the kernel rounds to the second.
        with suppress(OSError, ValueError, IndexError, AttributeError):
            ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
            age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
            if age >= 0:
                return cls(time.time() - age)
        return cls(psutil.Process().create_time())

    @property
    def seconds(self) -> dict[str, float]:
        """When each was reached, in seconds since the start; those that were not are missing."""
        return {name: round(self._reached[name], 2) for name in NAMES if name in self._reached}

    def reach(self, name: str) -> None:
        """The milestone is reached now, or was before."""
        self._reached.setdefault(name, time.time() - self.started)

    def commit(self) -> None:
        """A part was committed, as yet the last one."""
        self._reached["last commit"] = time.time() - self.started

    def see_engines(self, engines: Iterable[EngineStats]) -> None:
        """Takes in what engines say of themselves: the first one's start and first row, the last one's last row.

        What lies before the run's own start was another run's.
        """
        for stats in engines:
            times = {name: at - self.started for name, at in stats.times.items() if at >= self.started}
            for name, at in times.items():
                latest = name == "last row"
                known = self._reached.get(name, at)
                self._reached[name] = max(known, at) if latest else min(known, at)
