"""Where a run stops by itself, staged and resumable: money, a time, a number of rows."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from batchrun.errors import Interrupted
from batchrun.job.durations import parse_deadline

if TYPE_CHECKING:
    from batchrun.job.job import Job
    from batchrun.telemetry.progress import Progress


class Limits:
    """A run's limits, its deadline fixed when the run starts.

    Args:
        earlier: worker seconds of all earlier runs of this output, which `limits.max_cost` counts too.
        count_rows: whether `limits.max_rows` holds; of a retry all rows are done already.
    """

    def __init__(self, job: Job, earlier: float, count_rows: bool = True) -> None:
        settings = job.limits
        self.max_cost, self.max_rows = settings.max_cost, settings.max_rows if count_rows else None
        self.price = job.cluster.price_per_gpu_hour or 0.0
        self.earlier = earlier
        self.worker_seconds = earlier
        now = datetime.now().astimezone()
        self.deadline = None if settings.deadline is None else parse_deadline(settings.deadline, now)

    def on_progress(self, now: Progress) -> None:
        """A callback: raises Interrupted, naming the limit and how to go on, once one is reached."""
        self.worker_seconds = self.earlier + now.worker_seconds
        if now.partitions_done < now.partitions:
            self.check(now.rows_done)

    def check(self, rows: int) -> None:
        """The same for so many rows of the output that are done."""
        hours = self.worker_seconds / 3600
        cost = hours * self.price
        if self.max_cost is not None and cost >= self.max_cost:
            raise _reached("max_cost", f"{hours:,.2f} worker hours cost {cost:,.2f}", f"{self.max_cost:,}")
        if self.max_rows is not None and rows >= self.max_rows:
            raise _reached("max_rows", f"{rows:,} rows are done", f"{self.max_rows:,}")
        if self.deadline is not None and datetime.now().astimezone() >= self.deadline:
            raise _reached("deadline", "the time is up", self.deadline.isoformat(timespec="seconds"))


def _reached(name: str, what: str, limit: str) -> Interrupted:
    return Interrupted(
        f"stopped by limits.{name} ({what}, the limit is {limit})",
        fix=f"raise limits.{name} or leave it out, and the same command goes on from there",
    )
