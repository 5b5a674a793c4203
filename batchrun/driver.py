"""A plan onto Dask: the window in flight, progress, retries, the circuit breaker, the manifest."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable
from contextlib import ExitStack
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from distributed import Client, Future

from batchrun.cluster import connect
from batchrun.dataset.plan import Plan, difference
from batchrun.engine.protocol import EngineStats
from batchrun.errors import CorruptInput, Interrupted, Refused, StorageError, TooManyFaults
from batchrun.generation import EXAMPLES, Tally
from batchrun.job import Job
from batchrun.judging import Judge, Trial, one_line
from batchrun.output import identity, manifest, state
from batchrun.output.attempt import Receipt
from batchrun.output.layout import PLAN
from batchrun.output.lease import Lease
from batchrun.output.manifest import Manifest
from batchrun.prepare import Prepared, prepare
from batchrun.report.progress import Progress, Watch, silent
from batchrun.report.result import RunResult
from batchrun.stalls import Stalls
from batchrun.storage import NotFound
from batchrun.worker import (
    BatchrunPlugin,
    Task,
    TaskReceipt,
    WorkOrder,
    end_at_once,
    examine,
    request_stop,
    run_partition,
    run_partitions,
)

log = logging.getLogger(__name__)

WINDOW = 1.25  # tasks in flight per slot: no slot waits, and a worker that joins finds work left
POLL = 1.0  # seconds between two looks at the workers' counters
TASK_SECONDS = 1.0  # partitions shorter than this share a task, which costs the driver 5 ms whatever is in it
REGISTRATIONS = 3  # tries to reach all workers, of which one may be dying
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
        Interrupted: stopped on the way; the same call goes on from there.
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
            if client is None:
                client = stack.enter_context(connect(prepared.job.cluster))
            dispatch.execute(client)
        rows = [partition.rows for partition in prepared.plan.partitions]
        done = manifest.write(folder, prepared.layout, prepared.identity.job_hash, rows, dispatch.receipts)
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
        self.flying: dict[Future, list[int]] = {}
        self.alone: set[int] = set()  # partitions that share no task any more: one that they shared was lost
        self.pace = math.inf  # seconds that a partition takes, as of late
        self.finished: queue.Queue[Future] = queue.Queue()
        self.judge = Judge(self.plan, self.folder, self.layout)
        self.trials: dict[Future, Trial] = {}  # those of `flying` that try a suspect
        self.stalls = Stalls(self.job.limits.stall_seconds)
        self.workers: dict[str, Any] = {}
        self.receipts: dict[int, Receipt] = {}  # of parts that this run saw committed
        self.total = Tally(self.order.run, -1)  # of finished attempts
        self.engines: dict[tuple[str, int], EngineStats] = {}
        self.started = time.monotonic()

    def execute(self, client: Client) -> None:
        """Keeps the window full until every partition is committed."""
        next_poll = 0.0
        try:
            _register(client)
            while self.todo or self.flying or self.judge.suspects:
                if self.stop.is_set():
                    raise Interrupted("stopped")
                if client.status != "running":
                    raise ConnectionError("no connection to the Dask scheduler")
                if time.monotonic() >= next_poll:
                    self.workers = self._poll(client)
                    next_poll = time.monotonic() + POLL
                self._fill(client, self.workers)
                self._try_suspects(client)
                self._settle(POLL / 4)
        except (Interrupted, KeyboardInterrupt, OSError, TimeoutError) as interrupt:
            # What storage does wrong is a StorageError; an OSError that comes through is a connection of Dask's.
            lost = isinstance(interrupt, OSError | TimeoutError)
            reason = "lost the Dask scheduler" if lost else "stopped"
            self._drain(client)
            raise Interrupted(f"{reason} with {self._safe()}", self.folder.url,
                              "the same command goes on from there") from None  # fmt: skip
        except BaseException:
            self._drain(client)
            raise

    def _fill(self, client: Client, workers: dict[str, Any]) -> None:
        slots = sum(worker["nthreads"] for worker in workers.values())
        window = max(1, math.ceil(WINDOW * slots))
        while self.todo and len(self.flying) < window:
            members = self._next(window)
            tasks = [self._task(index) for index in members]
            self._submit(client, members, run_partitions, tasks, TASK_SECONDS)

    def _task(self, index: int) -> Task:
        partition = self.plan.partitions[index]
        return Task(partition, self.plan.files_of(partition))

    def _submit(
        self, client: Client, members: list[int], work: Callable[..., Any], *what: Any, **where: Any
    ) -> Future:
        key = f"batchrun-{self.layout.plan_hash[:8]}-{members[0]:05d}-{uuid.uuid4().hex[:8]}"
        future = client.submit(work, self.order, *what, key=key, pure=False, retries=0, **where)
        self.flying[future] = members
        future.add_done_callback(self.finished.put)
        return future

    def _next(self, window: int) -> list[int]:
        """The partitions of one task: one as a rule, more of tiny ones, fewer of these again towards the end."""
        members = [self.todo.popleft()]
        size = min(TASK_SECONDS / self.pace, len(self.todo) / (2 * window))
        while len(members) < size and not self.alone.intersection((members[0], self.todo[0])):
            members.append(self.todo.popleft())
        return members

    def _try_suspects(self, client: Client) -> None:
        """Begins trials once nothing else is in flight."""
        if self.todo or len(self.flying) > len(self.trials):
            return
        for future, trial in list(self.trials.items()):
            if trial.worker not in self.workers and not future.done():
                self.flying.pop(future)  # it left in peace, and nothing can be said of the rows
                del self.trials[future]
                future.cancel()
        for trial in list(self.judge.trials(self.trials.values(), self.workers)):
            self._try(client, trial)

    def _try(self, client: Client, trial: Trial) -> None:
        work = examine if trial.rows is None else run_partition
        task = self.judge.task(trial)
        future = self._submit(client, [trial.partition], work, task, workers=[trial.worker])
        self.trials[future] = trial

    def _take_trial(self, future: Future, trial: Trial) -> None:
        try:
            outcome = future.result(timeout=RECEIPT)
        except (Refused, StorageError):
            raise
        except Exception as error:
            self.judge.lost_alone(trial, error, self.workers)
            return
        if isinstance(outcome, TaskReceipt):
            self._book(trial.partition, outcome)
        else:
            self._try(future.client, self.judge.examined(trial, outcome))

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
        if future not in self.flying:
            return
        members = self.flying.pop(future)
        if trial := self.trials.pop(future, None):
            if future.status != "cancelled":
                self._take_trial(future, trial)
            return
        if future.status == "finished":
            try:
                receipts: list[TaskReceipt] = future.result(timeout=RECEIPT)
            except (OSError, TimeoutError) as lost:
                self._lose(members, lost)  # its worker left with the receipts; the parts may well be there
                return
            for index, receipt in zip(members, receipts, strict=False):
                self._book(index, receipt)
                if receipt.part is None:
                    self.todo.append(index)
            self._again_alone(members[len(receipts) :])
            return
        error = future.exception() if future.status == "error" else None
        if isinstance(error, (Refused, StorageError, CorruptInput)):
            raise error
        self._lose(members, error)

    def _book(self, index: int, receipt: TaskReceipt) -> None:
        _sum(self.total, receipt.tally)
        self._see_engine(receipt.worker, receipt.engine)
        if receipt.tally.rows:
            self.judge.progress(index)
        if receipt.part is None:
            return
        self.judge.committed(index)
        self.receipts[index] = receipt.part
        self.rows_committed += self.plan.partitions[index].rows
        known = math.isfinite(self.pace)
        self.pace = (self.pace + receipt.seconds) / 2 if known else receipt.seconds

    def _lose(self, members: list[int], error: BaseException | None) -> None:
        """A lost task that several partitions shared tells nothing of any one of them."""
        if len(members) > 1:
            log.warning(
                "%d partitions lost their task to %s; each goes on by itself", len(members), one_line(error)
            )
            self._again_alone(members)
        else:
            if self.judge.lost(members[0], error, self.workers, len(self.flying) + 1):
                self.todo.append(members[0])

    def _again_alone(self, members: list[int]) -> None:
        self.alone.update(members)
        self.todo.extend(members)

    def _poll(self, client: Client) -> dict[str, Any]:
        """Reads the workers' counters off the scheduler, shows them, and breaks the circuit where it must."""
        workers: dict[str, Any] = client.scheduler_info(n_workers=-1)["workers"]
        flying = {index for members in self.flying.values() for index in members}
        live = replace(self.total)
        covered = self.rows_committed
        for address, worker in workers.items():
            snapshot = worker["metrics"].get("batchrun") or {"tasks": [], "engines": []}
            engines = [EngineStats(**stats) for stats in snapshot["engines"]]
            for stats in engines:
                self._see_engine(address, stats)
            for tally in (Tally(**t) for t in snapshot["tasks"]):
                if tally.run == self.order.run and tally.partition in flying:
                    covered += tally.reused + tally.rows
                    _sum(live, tally)
                    self._end_if_stalled(client, address, tally, (snapshot["loading"], *map(_signs, engines)))
        self.stalls.forget(flying)
        self.watch(
            Progress(
                seconds=time.monotonic() - self.started,
                partitions=self.layout.partitions,
                partitions_done=self.layout.partitions - len(self.todo) - len(flying),
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

    def _end_if_stalled(self, client: Client, worker: str, tally: Tally, engines: Hashable) -> None:
        """Ends a worker that hangs alive; its attempts are then judged like any lost ones.

        An engine at work on another attempt's rows is a sign of life, and so is one that loads.
        """
        signs = (worker, tally.signs, tally.requests, engines)
        if self.stalls.stalled(tally.partition, signs, time.monotonic()):
            limit = self.job.limits.stall_seconds
            log.warning(
                "partition %d: no sign of progress for %g s; its worker is restarted", tally.partition, limit
            )
            client.run(end_at_once, workers=[worker], wait=False, on_error="ignore")

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
            self.flying.pop(future, None)
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


def _register(client: Client) -> None:
    """Hooks the plugin into all workers, now and later. One that dies in the midst of it fails the whole call."""
    for more in reversed(range(REGISTRATIONS)):
        try:
            client.register_plugin(BatchrunPlugin())
            return
        except OSError:
            if client.status != "running" or not more:
                raise


SUMMED = [f.name for f in fields(Tally) if f.name not in ("run", "partition", "examples")]


def _sum(into: Tally, tally: Tally) -> None:
    for name in SUMMED:
        setattr(into, name, getattr(into, name) + getattr(tally, name))
    into.examples = (into.examples + tally.examples)[:EXAMPLES]


def _signs(stats: EngineStats) -> Hashable:
    tokens = (stats.output_tokens, stats.computed_tokens)
    return (stats.pid, stats.requests, stats.completions, stats.batches, stats.steps, *tokens)


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
