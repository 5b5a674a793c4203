"""How fast a run is, how long the rest takes and what it costs, and one line of it for a person."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from batchrun.telemetry.progress import Progress, ProgressCallback, duration
from batchrun.telemetry.remaining import Remaining

# Seconds over which the shown rates are taken.
RATE_WINDOW = 30.0
# Seconds between two lines where there is no terminal.
LOG_EVERY = 15.0


class Rates:
    """Rates over the last half minute, and the seconds that the rest will take."""

    def __init__(self) -> None:
        self._recent: deque[Progress] = deque()
        self._remaining = Remaining()

    def add(self, now: Progress) -> None:
        """Takes in the newest progress."""
        if not now.counts.tokens:
            # Loading an engine says nothing of its speed.
            self._recent.clear()
        self._recent.append(now)
        while len(self._recent) > 2 and now.seconds - self._recent[1].seconds > RATE_WINDOW:
            self._recent.popleft()
        self._remaining.add(now)

    def per_second(self, name: str) -> float:
        """How fast the counter `name` of a run grows."""
        first, last = self._recent[0], self._recent[-1]
        elapsed = last.seconds - first.seconds
        return (
            max(0.0, getattr(last.counts, name) - getattr(first.counts, name)) / elapsed
            if elapsed > 0
            else 0.0
        )

    def of_worker(self, address: str) -> float:
        """Tokens per second, in and out, of one worker's engine; 0 while it is new."""
        seen = [
            (progress.seconds, view.engine.prompt_tokens + view.engine.output_tokens)
            for progress in (self._recent[0], self._recent[len(self._recent) // 2], self._recent[-1])
            for view in progress.worker_views
            if view.address == address and view.engine
        ]
        if len(seen) < 2 or seen[-1][0] <= seen[0][0]:
            return 0.0
        (began, before), (now, tokens) = seen[0], seen[-1]
        return max(0.0, tokens - before) / (now - began)

    def remaining(self) -> float | None:
        """Seconds left, None before the first row is through; see `Remaining`."""
        return self._remaining.seconds()

    def cost(self, price_per_gpu_hour: float) -> tuple[float, float | None]:
        """Money so far, and what the run will have cost in all, None as long as nobody knows."""
        now, remaining = self._recent[-1], self.remaining()
        spent = price_per_gpu_hour * now.gpu_seconds / 3600
        if remaining is None:
            return spent, None
        return spent, spent + price_per_gpu_hour * now.gpus * remaining / 3600


def log_lines(show: Callable[[Progress, Rates], None]) -> ProgressCallback:
    """A callback for where there is no terminal: calls `show` at the start and then every quarter of a minute."""
    rates = Rates()
    last = -LOG_EVERY

    def on_progress(now: Progress) -> None:
        nonlocal last
        rates.add(now)
        if time.monotonic() - last >= LOG_EVERY:
            last = time.monotonic()
            show(now, rates)

    return on_progress


def line(now: Progress, rates: Rates) -> str:
    """The progress as one line, where no live view is shown."""
    share = now.rows_done / now.rows if now.rows else 1.0
    parts = [
        f"{share:4.0%}",
        f"{now.rows_done:,}/{now.rows:,} rows",
        f"{now.partitions_done}/{now.partitions} parts",
        f"{rates.per_second('rows'):,.0f} rows/s",
        f"{rates.per_second('prompt_tokens'):,.0f} tokens/s in",
        f"{rates.per_second('output_tokens'):,.0f} out",
    ]
    if now.counts.failed:
        parts.append(f"{now.counts.failed:,} failed")
    if (remaining := rates.remaining()) is not None:
        parts.append(f"{duration(remaining)} left")
    if not now.workers:
        parts.append("waiting for a worker")
    return " · ".join(parts)
