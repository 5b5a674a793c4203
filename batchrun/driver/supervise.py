"""What every run has around its work, whether it begins, goes on or tries failed rows again."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from batchrun.driver.engines import standing_by
from batchrun.driver.notify import notifying
from batchrun.engine.processes.standby import Standby
from batchrun.job.job import Job
from batchrun.report.notebook import bar
from batchrun.report.result import RunResult
from batchrun.storage import deadline
from batchrun.telemetry.progress import ProgressCallback

if TYPE_CHECKING:
    from distributed import Client

Work = Callable[[Sequence[Standby], ProgressCallback], RunResult]


def supervised(
    job: Job,
    work: Work,
    client: Client | None,
    stop: threading.Event,
    on_progress: ProgressCallback,
    progress: bool,
    standby: Sequence[Standby] | None,
) -> RunResult:
    """Does the work with engines that stand by, unless a client has workers of its own, and with a notebook's bar;
    lets requests to stores end with `stop`, and tells `notify.url` what came of it all."""
    with ExitStack() as stack:
        if standby is None:
            standby = () if client else stack.enter_context(standing_by(job))
        shown = stack.enter_context(bar(progress, job.title, on_progress))
        stack.enter_context(deadline.until(stop.is_set))
        return notifying(job, lambda: work(standby, shown))
