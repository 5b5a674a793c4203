"""Attempts that show no sign of life: a worker or engine that hangs keeps its heartbeat, and its partition."""

from __future__ import annotations

from collections.abc import Collection, Hashable


class Stalls:
    """Remembers when each attempt's signs last changed. Signs are any counters that grow while work is done."""

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._seen: dict[tuple[int, str], tuple[Hashable, float]] = {}

    def stalled(self, partition: int, activity: Hashable, now: float, task: str = "") -> bool:
        """Whether the attempt's signs have been these for too long. The clock starts anew when it says so."""
        attempt = partition, task
        before = self._seen.get(attempt)
        if before is None or before[0] != activity:
            self._seen[attempt] = (activity, now)
            return False
        if now - before[1] <= self._seconds:
            return False
        del self._seen[attempt]
        return True

    def forget(self, running: Collection[int]) -> None:
        """Only attempts at these partitions are still running."""
        self._seen = {attempt: seen for attempt, seen in self._seen.items() if attempt[0] in running}
