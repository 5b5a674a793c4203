"""Failed rows of a complete output once more, after their cause is mended."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from batchrun.driver.dispatch import Dispatch
from batchrun.driver.prepare import prepare_again
from batchrun.driver.run import finish, result, try_store
from batchrun.errors import FaultCode, JobError, OutputError, nearest
from batchrun.job.job import Job
from batchrun.output import manifest
from batchrun.output import retry as retries
from batchrun.output.lease import Lease
from batchrun.report.notebook import bar
from batchrun.report.result import RunResult
from batchrun.telemetry.notify import notifying
from batchrun.telemetry.progress import Watch, silent

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
    watch: Watch = silent,
    progress: bool = True,
) -> RunResult:
    """Runs the failed rows of a complete output again; each part that has some is replaced by one overwrite.

    Rows that succeeded stay as they are, byte for byte, and cost nothing. A killed retry goes on where it ended: each
    part is the old one or the new one, staged rows are taken up. What became of which part stands in the manifest.

    The job may differ from the one that the output was begun with, since that is how most causes are mended: freely
    in `prompt.truncate`, `prompt.empty`, `prompt.max_bytes` and `generation.max_new_tokens`, which only decide
    whether a row gets an answer, and in whatever decides no answer (engine, cluster, limits); in template, sampling
    or model only by name (`allow`); never in what decides rows and columns (input, output). Every difference is
    recorded, and a later `run` of the changed job is taken as one of this output.

    Args:
        job: a Job, or the path of a job file.
        errors: error codes, such as PROMPT_TOO_LONG; rows with any error by default.
        allow: settings (or sections of them) that may differ, such as prompt.template or model.
        client, force, stop, watch, progress: as for `run`.

    Raises:
        OutputError: the output is not complete.
        ChangedError: the job differs in more than it may.
        JobError: no such error code.
        BatchrunError: as for `run`; what was staged and replaced stays.
    """
    known = [code.value for code in FaultCode]
    for code in errors:
        if code not in known:
            raise JobError(f"no error code {code!r}{nearest(code, known)}", "--error")
    job = job if isinstance(job, Job) else Job.load(job)
    with bar(progress, job.title, watch) as shown:
        return notifying(
            job, lambda: _retry(job, errors, allow, client, force, stop or threading.Event(), shown)
        )


def _retry(
    job: Job,
    errors: Sequence[str],
    allow: Sequence[str],
    client: Client | None,
    force: bool,
    stop: threading.Event,
    watch: Watch,
) -> RunResult:
    started = time.monotonic()
    prepared = prepare_again(job)
    folder, layout = prepared.folder, prepared.layout
    written = manifest.read(folder)
    if written is None:
        raise OutputError("not complete yet", folder.name, "finish it with `batchrun run` first")
    try_store(folder)
    with Lease(folder, force=force) as lease:
        found, _ = manifest.summaries(folder, layout)
        recorded = [past.number for past in written.retries if past.finished]
        one = retries.begin(folder, prepared.identity, errors, allow, found, recorded)
        work = {} if one is None else one.work(found)
        dispatch = Dispatch(prepared, work, stop, watch, one)
        done = finish(prepared, dispatch, lease, client)
    return result(prepared, done, time.monotonic() - started, dispatch)
