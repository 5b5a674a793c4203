"""A plan onto Dask: the window in flight, progress, retries, the circuit breaker, the manifest."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections import deque
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, Future

from batchrun.cluster import connect
from batchrun.dataset.plan import Plan, difference
from batchrun.engine.protocol import EngineStats
from batchrun.errors import BatchrunError, CorruptInput, Interrupted, Refused, StorageError, TooManyFaults
from batchrun.job import Job
from batchrun.limits import Limits
from batchrun.output import identity, manifest, state
from batchrun.output.layout import PLAN
from batchrun.output.lease import Lease
from batchrun.output.ledger import Ledger
from batchrun.output.manifest import Manifest
from batchrun.prepare import Prepared, prepare
from batchrun.report.progress import Progress, Watch, silent
from batchrun.report.result import RunResult
from batchrun.storage import NotFound
from batchrun.worker import (
    EXAMPLES,
    BatchrunPlugin,
    Tally,
    Task,
    TaskReceipt,
    WorkOrder,
    request_stop,
    run_partition,
)

log = logging.getLogger(__name__)

WINDOW = 1.25  # tasks in flight per slot: no slot waits, and a worker that joins finds work left
POLL = 1.0  # seconds between two looks at the workers' counters
STRIKES = 3  # attempts in a row that staged nothing new before a partition is given up
RECEIPT = 60.0  # seconds to wait for a finished task's receipt from its worker
DRAIN = 30.0  # seconds that tasks have to stage what they hold after a stop


def run(
    job: Job | str | Path,
    *,
    client: Client | None = None,
    force: bool = False,
    stop: threading.Event | None = None,
    watch: Watch = silent,
) -> RunResult:
    """Starts a job, or goes on where an earlier run of it ended, until its output is complete.

    Args:
        job: a Job, or the path of a job file.
        client: a Dask client to run on; otherwise the job's own `cluster` section decides.
        force: run although another driver seems to be at work. Still exact, at worst wasteful.
        stop: set it (from a signal handler, say) to let tasks stage what they hold and end the run.
        watch: called about once a second with the run's progress.

    Raises:
        Refused: before anything was generated: a bad job, input, model or destination, or changed ones.
        Interrupted: stopped on the way, by `stop` or one of the job's limits; the same call goes on from there.
        TooManyFaults: more than `limits.max_error_rate` of the rows failed.
        BatchrunError: anything else that ended the run; it can be resumed.
    """
    started = time.monotonic()
    prepared = prepare(job if isinstance(job, Job) else Job.load(job))
    done = _finished(prepared)
    if done is not None:
        return _result(prepared, done, time.monotonic() - started)
    folder = prepared.folder
    if not folder.probe():
        log.warning(
            "%s ignores conditional puts: two drivers at once may write a part twice, alike", folder.name
        )
    with Lease(folder, force=force), ExitStack() as stack:
        _pin(prepared)
        dispatch = Dispatch(prepared, stop or threading.Event(), watch)
        if dispatch.todo:
            ledger = stack.enter_context(Ledger(folder, dispatch.order.run, watch))
            limits = Limits(prepared.job, ledger.earlier_worker_seconds, ledger.see)
            limits.check(dispatch.rows_committed)
            dispatch.watch = limits.see
            if client is None:
                client = stack.enter_context(connect(prepared.job.cluster))
            dispatch.execute(client)
        rows = [partition.rows for partition in prepared.plan.partitions]
        done = manifest.write(folder, prepared.layout, prepared.identity.job_hash, rows)
    return _result(prepared, done, time.monotonic() - started, dispatch)


def _finished(prepared: Prepared) -> Manifest | None:
    """The manifest of an output that is complete already, for which nothing is to be written, not even a lease.

    Raises:
        ChangedError: the output was made from other inputs or another job.
    """
    if identity.read(prepared.folder) is None:
        return None
    _pin(prepared)
    written = manifest.read(prepared.folder)
    if written is None or not written.describes(state.scan(prepared.folder, prepared.layout)):
        return None
    return written


def _pin(prepared: Prepared) -> None:
    folder, plan = prepared.folder, prepared.plan

    def input_changes() -> list[str]:
        try:
            return difference(Plan.from_parquet(folder.read(PLAN)), plan)
        except NotFound:
            return []

    identity.pin(folder, prepared.identity, input_changes)
    if not folder.exists(PLAN):
        folder.put_if_absent(PLAN, plan.to_parquet())


class Dispatch:
    """The partitions of one run between storage and Dask: `todo`, `flying`, and what came of them."""

    def __init__(self, prepared: Prepared, stop: threading.Event, watch: Watch) -> None:
        self.plan, self.job, self.folder = prepared.plan, prepared.job, prepared.folder
        self.layout = prepared.layout
        self.order = WorkOrder(
            run=uuid.uuid4().hex,
            job=prepared.job,
            schema=prepared.plan.schema,
            layout=prepared.layout,
            job_hash=prepared.identity.job_hash,
            model_fingerprint=prepared.model.fingerprint,
        )
        self.stop, self.watch = stop, watch
        found = state.scan(self.folder, self.layout)
        found.refuse_foreign(self.folder)
        self.todo = deque(np.flatnonzero(~found.committed).tolist())
        rows = np.array([partition.rows for partition in self.plan.partitions])
        self.rows_committed = int(rows[found.committed].sum())
        self.flying: dict[Future, int] = {}
        self.finished: queue.Queue[Future] = queue.Queue()
        self.strikes: dict[int, tuple[int, int]] = {}  # partition: (attempts without progress, chunks seen)
        self.total = Tally(self.order.run, -1)  # of finished attempts
        self.engines: dict[tuple[str, int], EngineStats] = {}
        self.started = time.monotonic()

    def execute(self, client: Client) -> None:
        """Keeps the window full until every partition is committed."""
        client.register_plugin(BatchrunPlugin())
        next_poll = 0.0
        try:
            while self.todo or self.flying:
                if self.stop.is_set():
                    raise Interrupted("stopped")
                if client.status != "running":
                    raise ConnectionError("no connection to the Dask scheduler")
                if time.monotonic() >= next_poll:
                    workers = self._poll(client)
                    next_poll = time.monotonic() + POLL
                self._fill(client, workers)
                self._settle(POLL / 4)
            self._poll(client)
        except (Interrupted, KeyboardInterrupt, OSError, TimeoutError) as interrupt:
            # What storage does wrong is a StorageError; an OSError that comes through is a connection of Dask's.
            lost = isinstance(interrupt, OSError | TimeoutError)
            reason = "lost the Dask scheduler" if lost else getattr(interrupt, "what", "stopped")
            fix = getattr(interrupt, "fix", "") or "the same command goes on from there"
            self._drain(client)
            raise Interrupted(f"{reason}, with {self._safe()}", self.folder.url, fix) from None
        except BaseException:
            self._drain(client)
            raise

    def _fill(self, client: Client, workers: dict[str, Any]) -> None:
        slots = sum(worker["nthreads"] for worker in workers.values())
        while self.todo and len(self.flying) < max(1, math.ceil(WINDOW * slots)):
            index = self.todo.popleft()
            partition = self.plan.partitions[index]
            future = client.submit(
                run_partition,
                self.order,
                Task(partition, self.plan.files_of(partition)),
                key=f"batchrun-{self.layout.plan_hash[:8]}-{index:05d}-{uuid.uuid4().hex[:8]}",
                pure=False,
                retries=0,
            )
            self.flying[future] = index
            future.add_done_callback(self.finished.put)

    def _settle(self, timeout: float) -> None:
        """Takes in what finished; waits for the first one, then takes all that is there."""
        try:
            future = self.finished.get(timeout=timeout)
            while True:
                self._take(future)
                future = self.finished.get_nowait()
        except queue.Empty:
            return

    def _take(self, future: Future) -> None:
        index = self.flying.pop(future)
        if future.status == "finished":
            try:
                receipt: TaskReceipt = future.result(timeout=RECEIPT)
            except (OSError, TimeoutError) as lost:
                self._strike(index, lost)  # its worker left with the receipt; the part may well be there
                return
            _sum(self.total, receipt.tally)
            self._see_engine(receipt.worker, receipt.engine)
            if receipt.part is None:
                self.todo.append(index)
            else:
                self.rows_committed += self.plan.partitions[index].rows
            self.strikes.pop(index, None)
            return
        error = future.exception() if future.status == "error" else None
        if isinstance(error, (Refused, StorageError, CorruptInput)):
            raise error
        self._strike(index, error)

    def _strike(self, index: int, error: BaseException | None) -> None:
        """Judges a lost attempt by what it left in storage: one that staged something is submitted again for free.

        Dask's own suspicion blames every task that shared a worker with the guilty one.
        """
        strikes, chunks_before = self.strikes.get(index, (0, 0))
        chunks = len(self.folder.list(self.layout.stage(index)))
        strikes = 1 if chunks > chunks_before else strikes + 1
        if strikes >= STRIKES:
            raise BatchrunError(
                f"partition {index} failed {STRIKES} times without progress, last with {_one_line(error)}",
                self.folder.url,
                "look at the engine's message; the same command tries again",
            )
        log.warning("partition %d lost its attempt to %s; it goes on", index, _one_line(error))
        self.strikes[index] = (strikes, chunks)
        self.todo.append(index)

    def _poll(self, client: Client) -> dict[str, Any]:
        """Reads the workers' counters off the scheduler, shows them, and breaks the circuit where it must."""
        workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
        flying = set(self.flying.values())
        live = replace(self.total)
        covered = self.rows_committed
        for address, worker in workers.items():
            snapshot = worker["metrics"].get("batchrun") or {"tasks": [], "engines": []}
            for stats in snapshot["engines"]:
                self._see_engine(address, EngineStats(**stats))
            for tally in (Tally(**t) for t in snapshot["tasks"]):
                if tally.run == self.order.run and tally.partition in flying:
                    covered += tally.reused + tally.rows
                    _sum(live, tally)
        self.watch(
            Progress(
                seconds=time.monotonic() - self.started,
                partitions=self.layout.partitions,
                partitions_done=self.layout.partitions - len(self.todo) - len(self.flying),
                rows=self.plan.rows,
                rows_done=min(covered, self.plan.rows),
                rows_failed=live.failed,
                new_rows=live.rows,
                prompt_tokens=live.prompt_tokens,
                output_tokens=live.output_tokens,
                workers=len(workers),
            )
        )
        self._check_faults(live)
        return workers

    def _check_faults(self, tally: Tally) -> None:
        limits = self.job.limits
        if tally.rows >= limits.error_sample and tally.failed > limits.max_error_rate * tally.rows:
            examples = "; ".join(tally.examples)
            raise TooManyFaults(
                f"{tally.failed:,} of the first {tally.rows:,} rows failed, e.g. {examples}",
                self.folder.url,
                "mend the prompt or the model, or raise limits.max_error_rate",
            )

    def _drain(self, client: Client) -> None:
        """Lets the tasks in flight stage what they hold, for as long as that should take."""
        self.todo.clear()
        if client.status != "running":
            return
        client.run(request_stop, self.order.run, wait=False, on_error="ignore")
        deadline = time.monotonic() + DRAIN
        while self.flying and time.monotonic() < deadline:
            try:
                future = self.finished.get(timeout=0.2)
            except queue.Empty:
                continue
            del self.flying[future]
        client.cancel(list(self.flying))

    def _safe(self) -> str:
        found = state.scan(self.folder, self.layout)
        committed, begun = int(found.committed.sum()), int(found.streaming.sum())
        return f"{committed:,} of {self.layout.partitions:,} parts committed, {begun} begun"

    def _see_engine(self, worker: str, stats: EngineStats | None) -> None:
        if stats is None or not stats.pid:  # not loaded yet
            return
        key = (worker, stats.pid)
        if key not in self.engines or self.engines[key].requests <= stats.requests:
            self.engines[key] = stats


SUMMED = [f.name for f in fields(Tally) if f.name not in ("run", "partition", "examples")]


def _sum(into: Tally, tally: Tally) -> None:
    for name in SUMMED:
        setattr(into, name, getattr(into, name) + getattr(tally, name))
    into.examples = (into.examples + tally.examples)[:EXAMPLES]


def _one_line(error: BaseException | None) -> str:
    if error is None:
        return "a lost worker"
    return (
        str(error) if isinstance(error, BatchrunError) else f"{type(error).__name__}: {error}".splitlines()[0]
    )


def _result(
    prepared: Prepared, done: Manifest, seconds: float, dispatch: Dispatch | None = None
) -> RunResult:
    return RunResult(
        output=prepared.folder.name,
        rows=done.rows,
        ok=done.ok,
        failed=done.failed,
        parts=len(done.parts),
        prompt_tokens=done.prompt_tokens,
        output_tokens=done.output_tokens,
        errors=done.errors,
        seconds=seconds,
        requests=dispatch.total.requests if dispatch else 0,
        reused=dispatch.total.reused if dispatch else 0,
        engines=list(dispatch.engines.values()) if dispatch else [],
        part_keys=[part.key for part in done.parts],
        storage_options=prepared.job.output.storage_options,
    )
