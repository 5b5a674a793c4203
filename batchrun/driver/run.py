"""One run from start to end: prepare, pin, lease, dispatch, manifest."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
from distributed import Client

from batchrun import signals
from batchrun.counters import Counters
from batchrun.dataset.rows import places_in
from batchrun.driver.dispatch import Dispatch
from batchrun.driver.limits import Limits
from batchrun.driver.prepare import Prepared, compare, finished, look, settle, try_prompt
from batchrun.driver.recorder import observed
from batchrun.driver.supervise import supervised
from batchrun.driver.workers import Workers
from batchrun.engine.processes.standby import Standby
from batchrun.errors import ExitCode
from batchrun.job.job import Job
from batchrun.output import identity, lease, manifest, plans
from batchrun.output.identity import Identity
from batchrun.output.lease import Lease
from batchrun.output.manifest import Manifest
from batchrun.output.output import Output
from batchrun.report.result import RunResult
from batchrun.storage import Folder
from batchrun.telemetry import record
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import Progress, ProgressCallback, silent

log = logging.getLogger(__name__)


def run(
    job: Job | str | Path,
    *,
    client: Client | None = None,
    force: bool = False,
    stop: threading.Event | None = None,
    on_progress: ProgressCallback = silent,
    milestones: Milestones | None = None,
    progress: bool = True,
    standby: Sequence[Standby] | None = None,
) -> RunResult:
    """Starts a job, or goes on where an earlier run of it ended, until its output is complete.

    Args:
        job: a Job, or the path of a job file.
        client: a Dask client to run on; otherwise the job's own `cluster` section decides.
        force: run although another driver seems to be at work, which stops once it sees that. Exact either way.
        stop: set it (from a signal handler, say) to let tasks stage what they hold and end the run.
        on_progress: called about once a second with the run's progress.
        milestones: where to note what was reached when; from this call on by default.
        progress: show a progress bar where this is a notebook.
        standby: engines' processes that were started for this job before, which end with whoever started them.

    Raises:
        Refused: before anything was generated: a bad job, input, model or destination, or changed ones.
        LeaseHeld: another driver is at work, or took over on the way with `force`.
        Interrupted: stopped on the way, by `stop` or one of the job's limits; the same call goes on from there.
        TooManyFaults: more than `limits.max_error_rate` of the rows failed.
        BatchrunError: anything else that ended the run; it can be resumed.
    """
    milestones = milestones or Milestones()
    milestones.reach("imported")
    job = job if isinstance(job, Job) else Job.load(job)
    stop = stop or threading.Event()

    def work(standby: Sequence[Standby], shown: ProgressCallback) -> RunResult:
        return _run(job, client, force, stop, shown, milestones, standby)

    return supervised(job, work, client, stop, on_progress, progress, standby)


def _run(
    job: Job,
    client: Client | None,
    force: bool,
    stop: threading.Event,
    on_progress: ProgressCallback,
    milestones: Milestones,
    standby: Sequence[Standby],
) -> RunResult:
    prepared = look(job)
    if (done := finished(prepared)) is not None:
        return result(prepared, done, milestones)
    prepared = settle(prepared)
    with Workers(prepared, client, milestones, standby) as workers:
        try_store(prepared.folder)
        if force or not record.is_alive(lease.read(prepared.folder)):
            workers.begin()
        try_prompt(prepared)
        milestones.reach("planned")
        with Lease(prepared.folder, force=force) as held:
            output = prepared.output(_pin(prepared))
            dispatch = Dispatch(prepared, _uncommitted(output), stop, on_progress, milestones)
            done = finish(prepared, output, dispatch, held, workers)
    return result(prepared, done, milestones, dispatch)


def try_store(folder: Folder) -> None:
    """Writes and deletes an object before anything costs time. Raises OutputError where that is refused."""
    if not folder.probe():
        log.warning(
            "%s ignores conditional puts: two drivers at once may write a part twice, with the same rows",
            folder.name,
        )


def finish(
    prepared: Prepared, output: Output, dispatch: Dispatch, lease: Lease, workers: Workers
) -> Manifest:
    """Works off what the dispatch has to do, and writes what stands beside the parts, the manifest last."""

    def guard(now: Progress) -> None:
        lease.check()
        limits.on_progress(now)

    with ExitStack() as stack:
        if dispatch.partitions.todo:
            run = dispatch.order.run
            dispatch.on_progress = stack.enter_context(
                observed(prepared, run, dispatch.on_progress, dispatch.milestones)
            )
            limits = Limits(prepared.job, _spent(prepared), count_rows=dispatch.order.retry is None)
            limits.check(dispatch.partitions.rows_committed)
            dispatch.guard = guard
            try:
                dispatch.execute(workers.client)
            finally:
                workers.end()
        try:
            done = _conclude(prepared.job, output, dispatch)
        except KeyboardInterrupt:
            # The manifest may have been in its place already.
            if (written := manifest.current(prepared.folder, output.scan)) is not None:
                _decide(prepared, written)
            raise
        _decide(prepared, done)
        dispatch.milestones.reach("manifest")
        return done


def _decide(prepared: Prepared, done: Manifest) -> None:
    """Whatever still interrupts the process, the output is complete."""
    signals.decided(ExitCode.FAILED_ROWS if done.failed else ExitCode.COMPLETE)
    signals.safe = f"stopped; the output is complete: {prepared.folder.name}"


def _conclude(job: Job, output: Output, dispatch: Dispatch) -> Manifest:
    # A retry's parts may be replaced again at the same length: only a run's are what they were for good.
    receipts = dispatch.partitions.receipts if dispatch.order.retry is None else {}
    if job.output.failed is not None:
        found, _ = manifest.summaries(output, receipts)
        output.failed_rows.complete(found, places_in(job, output.plan))
    return manifest.write(output, receipts)


def _spent(prepared: Prepared) -> float:
    """GPU seconds of all earlier runs of the output, which only a limit on their cost asks for."""
    if prepared.job.limits.max_cost is None:
        return 0.0
    return sum(past.gpu_seconds for past in record.read_all(prepared.folder))


def _uncommitted(output: Output) -> dict[int, int]:
    """Partitions without a part and their rows, in the plans' order."""
    found = output.scan()
    found.refuse_foreign(output.folder)
    return {i: output.rows[i] for i in np.flatnonzero(~found.committed).tolist()}


def _pin(prepared: Prepared) -> Identity:
    """Pins the job and its plans, or the plans that are new; what the output is pinned to from now on.

    Of an output that was compared before this run had its lease, it is read again: another run may have come between.
    """
    folder = prepared.folder
    stored = None if prepared.pinned is None else identity.read(folder)
    if stored is not None:
        if stored != prepared.pinned:
            compare(prepared, stored)
        plans.add(folder, prepared.plans, max(prepared.known, 1))
        return stored
    # The job pins its first plan. A job without a plan would pin an input that nobody can tell any more.
    plans.add(folder, prepared.plans, prepared.known)
    stored = identity.pin(folder, prepared.identity)
    compare(prepared, stored)
    return stored


def result(
    prepared: Prepared, done: Manifest, milestones: Milestones, dispatch: Dispatch | None = None
) -> RunResult:
    """What a run gives back, from the manifest; with `dispatch`, what this run itself did for it."""
    return RunResult(
        output=prepared.folder.name,
        rows=done.rows,
        ok=done.ok,
        failed=done.failed,
        parts=len(done.parts),
        prompt_tokens=done.prompt_tokens,
        output_tokens=done.output_tokens,
        errors=done.errors,
        examples=done.examples,
        seconds=time.time() - milestones.started,
        milestones=milestones.seconds,
        finish_reasons=done.finish_reasons,
        empty=done.empty,
        counts=dispatch.totals.counts if dispatch else Counters(),
        engines=list(dispatch.totals.engines.values()) if dispatch else [],
        gpus_per_engine=prepared.gpus,
        gpu_seconds=prepared.gpus * sum(dispatch.totals.worker_time.values()) if dispatch else 0.0,
        part_keys=[part.key for part in done.parts],
        storage_options=prepared.job.output.storage_options,
        input_rows=done.rows if done.input_rows is None else done.input_rows,
    )
