"""Where a run stops by itself, staged and resumable: money, a time, a number of rows, too many that failed."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING

from batchrun.errors import Interrupted, TooManyFaults
from batchrun.job.durations import parse_deadline

if TYPE_CHECKING:
    from batchrun.counters import Counters
    from batchrun.job.job import Job
    from batchrun.telemetry.progress import Progress


class Limits:
    """A run's limits, its deadline fixed when the run starts.

    Args:
        earlier: GPU seconds of all earlier runs of this output, which `limits.max_cost` counts too.
        count_rows: whether `limits.max_rows` holds; of a retry all rows are done already.
    """

    def __init__(self, job: Job, earlier: float, count_rows: bool = True) -> None:
        self._job, settings = job, job.limits
        self.max_cost, self.max_rows = settings.max_cost, settings.max_rows if count_rows else None
        self.price = job.cluster.price_per_gpu_hour or 0.0
        self.earlier = earlier
        self.gpu_seconds = earlier
        now = datetime.now().astimezone()
        self.deadline = None if settings.deadline is None else parse_deadline(settings.deadline, now)

    def on_progress(self, now: Progress) -> None:
        """A callback for each look at the run.

        Raises:
            Interrupted: a limit is reached; names it and how to go on.
            TooManyFaults: too large a share of the rows failed.
        """
        self.gpu_seconds = self.earlier + now.gpu_seconds
        if now.partitions_done < now.partitions:
            self.check(now.rows_done)
        self._check_faults(now.counts)

    def check(self, rows: int) -> None:
        """Raises Interrupted likewise for so many rows of the output that are done."""
        hours = self.gpu_seconds / 3600
        cost = hours * self.price
        if self.max_cost is not None and cost >= self.max_cost:
            raise _reached("max_cost", f"{hours:,.2f} GPU hours cost {cost:,.2f}", f"{self.max_cost:,}")
        if self.max_rows is not None and rows >= self.max_rows:
            raise _reached("max_rows", f"{rows:,} rows are done", f"{self.max_rows:,}")
        if self.deadline is not None and datetime.now().astimezone() >= self.deadline:
            raise _reached("deadline", "the time is up", self.deadline.isoformat(timespec="seconds"))

    def _check_faults(self, counts: Counters) -> None:
        limits = self._job.limits
        if counts.rows >= limits.error_sample and counts.failed > limits.max_error_rate * counts.rows:
            examples = "; ".join(counts.examples)
            raise TooManyFaults(
                f"{counts.failed:,} of the first {counts.rows:,} rows failed, e.g. {examples}",
                self._job.output.path,
                "fix the prompt or the model, or raise limits.max_error_rate",
            )


def _reached(name: str, what: str, limit: str) -> Interrupted:
    return Interrupted(
        f"stopped by limits.{name} ({what}, the limit is {limit})",
        fix=f"raise limits.{name} or leave it out, and the same command goes on from there",
    )
