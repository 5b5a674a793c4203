"""Failed rows of a complete output once more, after their cause is fixed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchrun.driver.dispatch import Dispatch
from batchrun.driver.prepare import prepare_again, settle
from batchrun.driver.run import finish, result, try_store
from batchrun.driver.supervise import supervised
from batchrun.driver.workers import Workers
from batchrun.engine.processes.standby import Standby
from batchrun.errors import FaultCode, JobError, OutputError, nearest
from batchrun.job.job import Job
from batchrun.output import manifest
from batchrun.output import retry as retries
from batchrun.output.lease import Lease
from batchrun.report.result import RunResult
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import ProgressCallback, silent

if TYPE_CHECKING:
    from distributed import Client


def retry(
    job: Job | str | Path,
    *,
    errors: Sequence[str] = (),
    allow: Sequence[str] = (),
    client: Client | None = None,
    force: bool = False,
    stop: threading.Event | None = None,
    on_progress: ProgressCallback = silent,
    milestones: Milestones | None = None,
    progress: bool = True,
    standby: Sequence[Standby] | None = None,
) -> RunResult:
    """Runs the failed rows of a complete output again; each part that has some is replaced by one overwrite.

    Rows that succeeded stay as they are, byte for byte, and cost nothing. A killed retry goes on where it ended: each
    part is the old one or the new one, staged rows are taken up. What became of which part stands in the manifest.

    The job may differ from the one that the output was begun with, since that is how most causes are fixed: freely
    in `prompt.truncate`, `prompt.empty`, `prompt.max_bytes` and `generation.max_new_tokens`, which only decide
    whether a row gets an answer, and in whatever decides no answer (engine but for its cache_dtype, cluster, limits);
    in template, sampling or model only by name (`allow`); never in what decides rows and columns (input, output).
    Every difference is recorded, and a later `run` of the changed job is taken as one of this output.

    Args:
        job: a Job, or the path of a job file.
        errors: error codes, such as PROMPT_TOO_LONG; rows with any error by default.
        allow: settings (or sections of them) that may differ, such as prompt.template or model.
        client, force, stop, on_progress, milestones, progress, standby: as for `run`.

    Raises:
        OutputError: the output is not complete.
        ChangedError: the job differs in more than it may.
        JobError: no such error code.
        BatchrunError: as for `run`; what was staged and replaced stays.
    """
    milestones = milestones or Milestones()
    milestones.reach("imported")
    known = [code.value for code in FaultCode]
    for code in errors:
        if code not in known:
            raise JobError(f"no error code {code!r}{nearest(code, known)}", "--error")
    job = job if isinstance(job, Job) else Job.load(job)
    stop = stop or threading.Event()

    def work(standby: Sequence[Standby], shown: ProgressCallback) -> RunResult:
        return _retry(job, errors, allow, client, force, stop, shown, milestones, standby)

    return supervised(job, work, client, stop, on_progress, progress, standby)


def _retry(
    job: Job,
    errors: Sequence[str],
    allow: Sequence[str],
    client: Client | None,
    force: bool,
    stop: threading.Event,
    on_progress: ProgressCallback,
    milestones: Milestones,
    standby: Sequence[Standby],
) -> RunResult:
    prepared = prepare_again(job)
    assert prepared.pinned is not None
    folder, output = prepared.folder, prepared.output(prepared.pinned)
    written = manifest.read(folder)
    if written is None:
        raise OutputError("not complete yet", folder.name, "finish it with `batchrun run` first")
    prepared = settle(prepared)
    _ = prepared.codec
    milestones.reach("planned")
    try_store(folder)
    with Workers(prepared, client, milestones, standby) as workers, Lease(folder, force=force) as lease:
        found, _ = manifest.summaries(output)
        recorded = [past.number for past in written.retries if past.finished]
        one = retries.begin(folder, prepared.identity, errors, allow, found, recorded)
        # Of samples in rows of their own as few rows of the input as they may be of.
        each = prepared.job.output.rows_of_row
        work = {} if one is None else {part: -(-rows // each) for part, rows in one.work(found).items()}
        dispatch = Dispatch(prepared, work, stop, on_progress, milestones, one)
        if work:
            workers.begin()
        done = finish(prepared, output, dispatch, lease, workers)
    return result(prepared, done, milestones, dispatch)
