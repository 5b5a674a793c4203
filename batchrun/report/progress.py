"""How far a run is: what the driver knows each second, and one line of it for a person."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.text import Text

RATE_WINDOW = 30.0  # seconds over which the shown rates are taken
LOG_EVERY = 15.0  # seconds between two lines where there is no terminal


@dataclass(frozen=True, slots=True)
class Progress:
    """A run at one moment. Rows count what is covered, of earlier runs too; tokens are this run's alone."""

    seconds: float
    partitions: int
    partitions_done: int
    rows: int
    rows_done: int
    rows_failed: int
    new_rows: int
    prompt_tokens: int
    output_tokens: int
    workers: int


Watch = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Shows nothing."""


class Rates:
    """Rows and tokens per second over the last half minute, and the seconds that the rest will take."""

    def __init__(self) -> None:
        self._seen: deque[Progress] = deque()

    def add(self, now: Progress) -> None:
        self._seen.append(now)
        while len(self._seen) > 2 and now.seconds - self._seen[1].seconds > RATE_WINDOW:
            self._seen.popleft()

    def per_second(self, field: str) -> float:
        first, last = self._seen[0], self._seen[-1]
        elapsed = last.seconds - first.seconds
        return (getattr(last, field) - getattr(first, field)) / elapsed if elapsed > 0 else 0.0

    def remaining(self) -> float | None:
        rate = self.per_second("new_rows")
        return (self._seen[-1].rows - self._seen[-1].rows_done) / rate if rate > 0 else None


@contextmanager
def show(console: Console) -> Iterator[Watch]:
    """Yields a watch that keeps one live line on a terminal, or prints a plain line now and then elsewhere."""
    rates = Rates()
    if console.is_terminal:
        with Live(Text("starting"), console=console, refresh_per_second=4, transient=True) as live:

            def redraw(now: Progress) -> None:
                rates.add(now)
                live.update(Text(line(now, rates), overflow="ellipsis", no_wrap=True))

            yield redraw
        return
    last = -LOG_EVERY

    def log(now: Progress) -> None:
        nonlocal last
        rates.add(now)
        if time.monotonic() - last >= LOG_EVERY:
            last = time.monotonic()
            print(line(now, rates), file=sys.stderr, flush=True)

    yield log


def line(now: Progress, rates: Rates) -> str:
    share = now.rows_done / now.rows if now.rows else 1.0
    parts = [
        f"{share:4.0%}",
        f"{now.rows_done:,}/{now.rows:,} rows",
        f"{now.partitions_done}/{now.partitions} parts",
        f"{rates.per_second('new_rows'):,.0f} rows/s",
        f"{rates.per_second('prompt_tokens'):,.0f} tokens/s in",
        f"{rates.per_second('output_tokens'):,.0f} out",
    ]
    if now.rows_failed:
        parts.append(f"{now.rows_failed:,} failed")
    if (remaining := rates.remaining()) is not None:
        parts.append(f"{duration(remaining)} left")
    if not now.workers:
        parts.append("waiting for a worker")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 12 min 05 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
