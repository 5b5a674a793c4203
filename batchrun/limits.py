"""Where a run stops by itself, staged and resumable: money, a time, a number of rows."""

from __future__ import annotations

import re
from datetime import datetime, timedelta

from batchrun.errors import Interrupted

_DURATION = re.compile(r"(?:(\d+)d)?(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def parse_duration(text: str) -> timedelta:
    """A duration such as 90s, 30m, 6h, 1d or 1h30m.

    Raises:
        ValueError: it is none, or nothing at all.
    """
    match = _DURATION.fullmatch(text.strip())
    if not match or not any(match.groups()):
        raise ValueError(f"{text!r} is no duration such as 90s, 30m, 6h or 1h30m")
    days, hours, minutes, seconds = (int(group or 0) for group in match.groups())
    return timedelta(days=days, hours=hours, minutes=minutes, seconds=seconds)


def parse_deadline(text: str, now: datetime) -> datetime:
    """An ISO 8601 time, local unless it names an offset, or a duration from `now` on (which has a time zone).

    Raises:
        ValueError: it is neither.
    """
    try:
        return now + parse_duration(text)
    except ValueError:
        pass
    try:
        return datetime.fromisoformat(text.strip()).astimezone()
    except ValueError:
        raise ValueError(
            f"{text!r} is neither a duration such as 6h nor a time such as 2026-01-31T06:00+01:00"
        ) from None


class Limits:
    """A run's limits, its deadline fixed when the run starts.

    Args:
        max_cost: of all runs of this output together, at `price` for each hour of each worker.
        max_rows: rows of the output that are done, those of earlier runs among them.
    """

    def __init__(
        self, max_cost: float | None, price: float | None, deadline: str | None, max_rows: int | None
    ) -> None:
        self.max_cost, self.price, self.max_rows = max_cost, price or 0.0, max_rows
        self.deadline = None if deadline is None else parse_deadline(deadline, datetime.now().astimezone())

    def check(self, rows: int, worker_seconds: float) -> None:
        """Raises Interrupted, naming the limit and how to go on, once one is reached."""
        cost = worker_seconds / 3600 * self.price
        if self.max_cost is not None and cost >= self.max_cost:
            raise _reached(
                "max_cost",
                f"{worker_seconds / 3600:,.2f} worker hours cost {cost:,.2f}",
                f"{self.max_cost:,}",
            )
        if self.max_rows is not None and rows >= self.max_rows:
            raise _reached("max_rows", f"{rows:,} rows are done", f"{self.max_rows:,}")
        if self.deadline is not None and datetime.now().astimezone() >= self.deadline:
            raise _reached("deadline", "the time is up", self.deadline.isoformat(timespec="seconds"))


def _reached(name: str, what: str, limit: str) -> Interrupted:
    return Interrupted(
        f"stopped by limits.{name} ({what}, the limit is {limit})",
        fix=f"raise limits.{name} or leave it out, and the same command goes on from there",
    )
