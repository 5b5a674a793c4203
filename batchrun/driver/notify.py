"""A webhook that is told when a run has ended, however it ended."""

from __future__ import annotations

import json
import logging
import threading
import urllib.request
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from batchrun.errors import ExitCode, is_interrupt, one_line
from batchrun.telemetry.progress import duration
from batchrun.telemetry.redact import Redactor

if TYPE_CHECKING:
    from batchrun.job.job import Job
    from batchrun.report.result import RunResult

log = logging.getLogger(__name__)

# For the whole request: a webhook never keeps a run from ending.
SECONDS = 10.0


def notifying(job: Job, work: Callable[[], RunResult]) -> RunResult:
    """Does the work of a run, then tells `notify.url` once what came of it; a webhook that fails is a warning."""
    if job.notify is None:
        return work()
    try:
        result = work()
    except BaseException as error:
        _send(job, _failure(job, error))
        raise
    _send(job, _success(job, result))
    return result


def _success(job: Job, result: RunResult) -> dict[str, Any]:
    values = result.to_json()
    for name in ("engines", "examples", "counts"):
        del values[name]
    how = "complete with failed rows" if result.failed else "complete"
    text = f"{result.ok:,} of {result.rows:,} rows answered in {duration(result.seconds)}"
    failed = f", {result.failed:,} failed" if result.failed else ""
    return {**values, "job": job.title, "text": f"{job.title}: {how}, {text}{failed}: {result.output}"}


def _failure(job: Job, error: BaseException) -> dict[str, Any]:
    stopped = is_interrupt(error)
    code = ExitCode.INTERRUPTED if stopped else getattr(error, "exit_code", ExitCode.FAILED)
    status, what = code.name.lower(), "stopped" if stopped else one_line(error)
    values = {"status": status, "exit_code": int(code), "error": what, "output": job.output.path}
    return {**values, "job": job.title, "text": f"{job.title}: {status}, {what}"}


def _send(job: Job, values: dict[str, Any]) -> None:
    """Posts in a thread of its own, since neither a name server nor a slow answer heeds a socket's timeout."""
    redact = Redactor()
    redact.add(job.secrets())
    assert job.notify is not None
    url, body = job.notify.url, {"text": values["text"]} if job.notify.for_slack else values
    data = redact(json.dumps(body)).encode()
    problem = [f"no answer within {SECONDS:g} s"]

    def post() -> None:
        headers = {"Content-Type": "application/json", "User-Agent": "batchrun"}
        try:
            request = urllib.request.Request(url, data, headers)
            with urllib.request.urlopen(request, timeout=SECONDS):
                problem.clear()
        except Exception as error:
            # Whatever it is, the run has ended as it has.
            problem[0] = redact(one_line(error))

    thread = threading.Thread(target=post, name="batchrun-notify", daemon=True)
    thread.start()
    thread.join(SECONDS)
    if problem:
        log.warning("notify.url was not told of the run's end: %s", problem[0])
