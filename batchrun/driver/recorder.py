"""Everything that watches a run beside its user: its record, its metrics, and the report at its end."""

from __future__ import annotations

import logging
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from types import ModuleType

from batchrun.counters import SUMS
from batchrun.driver.prepare import Prepared
from batchrun.errors import (
    BatchrunError,
    ExitCode,
    InternalError,
    LeaseHeld,
    StorageError,
    is_interrupt,
    one_line,
)
from batchrun.storage.folder import PROBE_PATIENCE
from batchrun.telemetry import agreement, engine_log, record
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import Progress, ProgressCallback
from batchrun.telemetry.record import RunRecord, Timeline
from batchrun.telemetry.redact import Redactor

log = logging.getLogger(__name__)

# Seconds between two puts of a running run's record.
WRITE_EVERY = 15.0


@contextmanager
def observed(
    prepared: Prepared, run: str, on_progress: ProgressCallback, milestones: Milestones
) -> Iterator[ProgressCallback]:
    """Yields a callback that passes everything on to `on_progress` and keeps the run's record meanwhile.

    However the run ends, its record says how, and `_job/report.html` tells what is known by then. The job's
    `cluster.metrics_port` is served for as long as this is open.
    """
    with ExitStack() as stack:
        callbacks = [on_progress]
        port = prepared.job.cluster.metrics_port
        if port is not None:
            # Only who asks for metrics pays for them.
            from batchrun.telemetry import prometheus

            info = {"model": prepared.job.model.name, "output": prepared.folder.name}
            callbacks.insert(0, stack.enter_context(prometheus.serve(port, info)))
        recorder = Recorder(prepared, run, milestones)
        callbacks.insert(0, recorder.on_progress)

        def forward(now: Progress) -> None:
            for one in callbacks:
                one(now)

        try:
            yield forward
        except BaseException as error:
            # A store that has just failed for minutes is not waited for again; it may be the input's, though.
            patience = PROBE_PATIENCE if isinstance(error, StorageError) else None
            recorder.end(*_outcome(error), _traceback(error), patience)
            raise
        recorder.end("complete")


class Recorder:
    """Folds a run's progress into its record, and puts it now and then from a thread of its own."""

    def __init__(self, prepared: Prepared, run: str, milestones: Milestones) -> None:
        self.milestones = milestones
        job = prepared.job
        self.prepared = prepared
        self.redact = Redactor()
        self.redact.add(job.secrets())
        self.record = RunRecord(
            run=run,
            started=record.now(),
            outcome="running",
            seconds=0.0,
            plan_rows=prepared.plan.rows,
            partitions=prepared.layout.partitions,
            price_per_gpu_hour=job.cluster.price_per_gpu_hour,
            model=job.model.name,
            model_fingerprint=prepared.model.fingerprint,
            job_hash=prepared.identity.job_hash,
            job=job.as_written(),
            versions=record.versions(),
            machine=record.machine(),
            agreement=None if job.fp8 is None else agreement.recall(prepared.model.fingerprint, job.fp8),
        )
        self._began = time.monotonic()
        self._timeline = Timeline()
        self._ended = threading.Event()
        # In this context, which knows who tells the run to stop.
        write = partial(copy_context().run, self._write_now_and_then)
        self._thread = threading.Thread(target=write, name="batchrun-record", daemon=True)
        self._thread.start()

    def on_progress(self, now: Progress) -> None:
        """Takes in what the run has come to."""
        last = self.record
        loaded = [engine for engine in now.engines if engine.pid]
        engine = loaded[-1] if loaded else None
        self.milestones.see_engines(loaded)
        self._timeline.add(_sample(now))
        if now.counts.rows and not last.counts.rows:
            # Plots take a second to import, which this process has while the rows are generated.
            threading.Thread(target=_import_ahead, daemon=True).start()
        self.record = replace(
            last,
            seconds=now.seconds,
            counts=now.counts,
            workers=max(last.workers, now.workers),
            gpus_per_worker=now.gpus_per_worker,
            worker_time=dict(now.worker_time),
            engine=engine.engine if engine else "",
            attention=engine.attention if engine else "",
            device=engine.device if engine else "",
            dtype=engine.dtype if engine else "",
            load_seconds=max((e.load_seconds for e in loaded), default=0.0),
            busy_seconds=sum(e.busy_seconds for e in loaded),
            computed_tokens=now.computed_tokens,
            real_tokens=now.real_tokens,
            shared_tokens=now.shared_tokens,
            batches=now.batches,
            milestones=self.milestones.seconds,
            notes=sorted({note for e in loaded for note in e.notes}),
            slowest=list(now.slowest),
            samples=self._timeline.columns(),
        )

    def end(
        self, outcome: str, message: str = "", traceback: str = "", patience: float | None = None
    ) -> None:
        """Writes the record for the last time, then the report. A run never fails over what only tells of it."""
        self._ended.set()
        self._thread.join()
        self.record = replace(
            self.record,
            outcome=outcome,
            message=message,
            traceback=traceback,
            seconds=time.monotonic() - self._began,
            milestones=self.milestones.seconds,
        )
        try:
            if patience is None:
                logs = engine_log.keys(self.prepared.folder, self.record.run)
                self.record = replace(self.record, engine_logs=logs)
            self._write(patience)
            _import_report().write(self.prepared.job, self.redact)
            self.milestones.reach("report")
        except StorageError as error:
            # What ended the run is told by whoever catches it.
            if error.what != message:
                log.warning("the run's report could not be written: %s", error)
        except Exception as error:
            # Whatever it is, the answers are there and the run's own outcome stands.
            log.warning("the run's report could not be written: %s", one_line(error))

    def _write_now_and_then(self) -> None:
        while not self._ended.wait(WRITE_EVERY):
            try:
                self._write()
            except StorageError as error:
                log.warning("the run's record could not be written: %s", error)

    def _write(self, patience: float | None = None) -> None:
        record.write(self.prepared.folder, self.record, self.redact, patience)


def _import_report() -> ModuleType:
    from batchrun.report import page

    return page


def _import_ahead() -> None:
    # Whoever writes the report imports again what could not be imported, and says why.
    with suppress(Exception):
        _import_report()


def _outcome(error: BaseException) -> tuple[str, str]:
    if is_interrupt(error):
        return "interrupted", "stopped"
    if isinstance(error, BatchrunError):
        interrupted = error.exit_code == ExitCode.INTERRUPTED or isinstance(error, LeaseHeld)
        return ("interrupted" if interrupted else "failed"), error.what
    return "failed", one_line(error)


def _traceback(error: BaseException) -> str:
    """Where the program went wrong; empty for an error that is no bug."""
    if is_interrupt(error) or (isinstance(error, BatchrunError) and not isinstance(error, InternalError)):
        return ""
    return "".join(traceback.format_exception(error))


def _sample(now: Progress) -> dict[str, float | None]:
    """Sums since the start, and gauges of this moment (shares between 0 and 1)."""
    return {
        "seconds": now.seconds,
        "rows_done": now.rows_done,
        **{name: getattr(now.counts, name) for name in SUMS},
        "real_tokens": now.real_tokens,
        "computed_tokens": now.computed_tokens,
        "batches": now.batches,
        "workers": now.workers,
        "waiting": now.waiting,
        "pool_fill": now.pool_fill,
        "gpu_use": now.gpu_use,
        "gpu_memory": now.gpu_memory,
    }
