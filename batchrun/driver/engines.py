"""Engines' processes that start with the run, before there are workers to have them."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from batchrun.engine.processes.standby import Standby
from batchrun.job.job import Job
from batchrun.telemetry.gpu import environment_of_gpus, local_workers, visible_gpus


@contextmanager
def standing_by(job: Job) -> Iterator[Sequence[Standby]]:
    """One for each local worker, in the workers' order; they end with the context. None where engines are not
    batchrun's own, which may bear no imports ahead, or workers are not on this machine.

    They import and no more until the job is found to be good: no GPU is touched.
    """
    with ExitStack() as processes:
        wanted = sys.platform == "linux" and job.cluster.is_local and ":" not in job.engine.kind
        gpus = visible_gpus() if wanted else []
        each = job.engine.gpus
        if each == "auto":
            # How many GPUs an engine sees is only known with the model, unless there is no choice.
            each = 1
            wanted = wanted and len(gpus) < 2
        count = local_workers(job.cluster.workers, gpus, each) if wanted else 0
        # More workers than GPUs are refused when they are to start.
        count = min(count, len(gpus) // each) if gpus else count
        yield [
            processes.enter_context(Standby(job.engine.kind, environment_of_gpus(gpus, i, each)))
            for i in range(count)
        ]
