"""A plan onto Dask: the window in flight, lost attempts, stops."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Hashable, Iterable
from dataclasses import replace
from typing import Any

from distributed import Client, Future, KilledWorker

from batchrun import signals
from batchrun.cluster import dashboard
from batchrun.driver import heartbeats
from batchrun.driver.heartbeats import Heartbeats
from batchrun.driver.lost_attempts import IsolatedAttempt, LostAttemptPolicy, reason_of
from batchrun.driver.prepare import Prepared
from batchrun.driver.receipts import ReceiptReader
from batchrun.driver.stalls import Stalls
from batchrun.driver.totals import RunTotals
from batchrun.driver.workers import look_at, register_plugin, tell
from batchrun.errors import (
    CorruptInput,
    InternalError,
    Interrupted,
    Refused,
    StorageError,
)
from batchrun.output.attempt import Receipt
from batchrun.output.retry import Retry
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import Progress, ProgressCallback, silent
from batchrun.worker.generation import AttemptCounters
from batchrun.worker.order import Task, TaskReceipt, WorkOrder
from batchrun.worker.plugin import end_at_once, request_stop
from batchrun.worker.task import examine, run_partition, run_partitions

log = logging.getLogger(__name__)

# Tasks in flight per slot: no slot waits, and a worker that joins finds work left.
IN_FLIGHT_PER_SLOT = 1.25
# Seconds between two looks at the workers' counters.
POLL = 1.0
# Partitions shorter than this share a task, which costs the driver 5 ms whatever is in it.
TASK_SECONDS = 1.0
# Seconds that tasks have to stage what they hold after a stop.
DRAIN_TIMEOUT = 30.0
# Seconds between two calls to stop: workers come meanwhile, and take up what others have lost.
STOP_EVERY = 0.5
# Seconds after a stop from which on only tasks that hold rows are waited for.
OPENING = 2.5
# Errors of a partition that end the run; others lose the attempt.
FATAL_ERRORS = (Refused, StorageError, CorruptInput, InternalError)


class Dispatch:
    """The partitions of one run between storage and Dask: `todo`, `in_flight`, and what came of them.

    `work` says how many rows of which partitions are to be generated; with `retry` they are those that it selects.
    """

    def __init__(
        self,
        prepared: Prepared,
        work: dict[int, int],
        stop: threading.Event,
        on_progress: ProgressCallback,
        milestones: Milestones,
        retry: Retry | None = None,
    ) -> None:
        self.plan, self.job, self.folder = prepared.plan, prepared.job, prepared.folder
        self.layout = replace(prepared.layout, generation=0 if retry is None else retry.number)
        self.work = work
        self.order = WorkOrder(
            run=uuid.uuid4().hex,
            job=prepared.job,
            schema=prepared.plan.schema,
            layout=self.layout,
            job_hash=prepared.identity.job_hash,
            model_fingerprint=prepared.model.fingerprint,
            retry=retry,
        )
        self.stop, self.on_progress, self.milestones = stop, on_progress, milestones
        self.reader = ReceiptReader(stop)
        # Raises once the run is to end: the circuit breaker and the job's limits.
        self.guard: ProgressCallback = silent
        self.todo = deque(work)
        self.rows_committed = self.plan.rows - sum(work.values())
        self.in_flight: dict[Future, list[int]] = {}
        # Partitions that share no task any more: one that they shared was lost.
        self.single: set[int] = set()
        # Seconds that a partition takes, as of late.
        self.pace = math.inf
        self.finished: queue.Queue[Future] = queue.Queue()
        self.policy = LostAttemptPolicy(self.plan, self.folder, self.layout, proven=self.rows_committed > 0)
        self.stalls = Stalls(self.job.limits.stall_seconds)
        # Those of `in_flight` that try a suspect; those that only some workers may do, and which.
        self.isolated_attempts: dict[Future, IsolatedAttempt] = {}
        self.kept: dict[Future, list[str]] = {}
        self.workers: dict[str, Any] = {}
        # Of parts that this run saw committed.
        self.receipts: dict[int, Receipt] = {}
        # Rows, by partitions whose tasks were told to stop.
        self.staged: dict[int, int] = {}
        self.totals = RunTotals()
        self.dashboard: str | None = None

    def execute(self, client: Client) -> None:
        """Keeps the window full until every partition is committed."""
        try:
            # Until its tasks are drained, a stop is this loop's to see.
            with signals.attended():
                try:
                    self._work_off(client)
                except BaseException:
                    self._wind_up(client)
                    raise
        except (Interrupted, KeyboardInterrupt, OSError, TimeoutError) as interrupt:
            # What storage does wrong is a StorageError; an OSError that comes through is a connection of Dask's.
            lost = isinstance(interrupt, OSError | TimeoutError)
            reason = "lost the Dask scheduler" if lost else getattr(interrupt, "what", "stopped")
            fix = getattr(interrupt, "fix", "") or "the same command goes on from there"
            stopped = Interrupted(f"{reason}; {self._safe()}", self.folder.name, fix)
            signals.safe = str(stopped)
            raise stopped from None

    def _work_off(self, client: Client) -> None:
        next_poll = 0.0
        register_plugin(client)
        self.dashboard = dashboard(client)
        while self.todo or self.in_flight or self.policy.suspected:
            if self.stop.is_set():
                raise Interrupted("stopped")
            if client.status != "running":
                raise ConnectionError("no connection to the Dask scheduler")
            if time.monotonic() >= next_poll:
                self.workers = self._poll(client)
                self.policy.check_engines(self.workers)
                next_poll = time.monotonic() + POLL
            self._fill(client, self.workers)
            self._try_suspected(client)
            self._settle(POLL / 4)
        self._poll(client)

    def _fill(self, client: Client, workers: dict[str, Any]) -> None:
        able = self.policy.able(workers)
        self._free_kept(workers)
        slots = sum(workers[name]["nthreads"] for name in able)
        window = max(1, math.ceil(IN_FLIGHT_PER_SLOT * slots)) if able or not workers else 0
        while self.todo and len(self.in_flight) < window:
            members = self._next(window)
            tasks = [self._task(index) for index in members]
            where = {} if len(able) == len(workers) else {"workers": able}
            future = self._submit(client, members, run_partitions, tasks, TASK_SECONDS, **where)
            if where:
                self.kept[future] = able

    def _task(self, index: int) -> Task:
        partition = self.plan.partitions[index]
        return Task(partition, self.plan.files_of(partition), proven=self.policy.proven)

    def _free_kept(self, workers: dict[str, Any]) -> None:
        """What is kept for workers that are gone would wait for ever."""
        self.kept = {future: able for future, able in self.kept.items() if future in self.in_flight}
        for future, able in list(self.kept.items()):
            if not workers.keys() & set(able):
                del self.kept[future]
                self.todo.extend(self.in_flight.pop(future))
                future.cancel()

    def _submit(
        self, client: Client, members: list[int], work: Callable[..., Any], *arguments: Any, **where: Any
    ) -> Future:
        key = f"batchrun-{self.layout.plan_hash[:8]}-{members[0]:05d}-{uuid.uuid4().hex[:8]}"
        future = client.submit(work, self.order, *arguments, key=key, pure=False, retries=0, **where)
        self.in_flight[future] = members
        future.add_done_callback(self.finished.put)
        return future

    def _try_suspected(self, client: Client) -> None:
        """Begins trials once nothing else is in flight."""
        if self.todo or len(self.in_flight) > len(self.isolated_attempts):
            return
        for future, isolated in list(self.isolated_attempts.items()):
            if isolated.worker not in self.workers and not future.done():
                # It left in peace, and nothing can be said of the rows.
                self.in_flight.pop(future)
                del self.isolated_attempts[future]
                future.cancel()
        for isolated in list(self.policy.isolated_attempts(self.isolated_attempts.values(), self.workers)):
            self._try(client, isolated)

    def _try(self, client: Client, isolated: IsolatedAttempt) -> None:
        work = examine if isolated.rows is None else run_partition
        task = self.policy.task(isolated)
        future = self._submit(client, [isolated.partition], work, task, workers=[isolated.worker])
        self.isolated_attempts[future] = isolated

    def _take_isolated(self, future: Future, isolated: IsolatedAttempt) -> None:
        try:
            outcome = self.reader.read(future)
        except (Refused, StorageError, InternalError) as error:
            self.totals.add_lost(error)
            raise
        except Exception as error:
            self.policy.lost_alone(isolated, error, self.workers)
            # It may be gone, and what is pinned to a worker that is gone waits for ever: ask first who is there.
            self.workers = {name: one for name, one in self.workers.items() if name != isolated.worker}
            return
        if isinstance(outcome, TaskReceipt):
            self._book(isolated.partition, outcome)
        else:
            self._try(future.client, self.policy.examined(isolated, outcome))

    def _next(self, window: int) -> list[int]:
        """The partitions of one task: one as a rule, more of tiny ones, fewer of these again towards the end."""
        members = [self.todo.popleft()]
        size = min(TASK_SECONDS / self.pace, len(self.todo) / (2 * window))
        while len(members) < size and not self.single.intersection((members[0], self.todo[0])):
            members.append(self.todo.popleft())
        return members

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
        if future not in self.in_flight:
            return
        members = self.in_flight.pop(future)
        if isolated := self.isolated_attempts.pop(future, None):
            if future.status != "cancelled":
                self._take_isolated(future, isolated)
            return
        if future.status == "finished":
            try:
                receipts: list[TaskReceipt] = self.reader.read(future, self.finished.queue)
            except FATAL_ERRORS as final:
                self.totals.add_lost(final)
                raise
            except Exception as lost:
                # Its worker left with the receipts, and Dask may have begun the task anew. The parts may well be there.
                self._lose(members, lost)
                return
            for index, receipt in zip(members, receipts, strict=False):
                self._book(index, receipt)
                if receipt.part is None:
                    self.todo.append(index)
            self._again_alone(members[len(receipts) :])
            return
        error = future.exception() if future.status == "error" else None
        if isinstance(error, FATAL_ERRORS):
            self.totals.add_lost(error)
            raise error
        self._lose(members, error)

    def _book(self, index: int, receipt: TaskReceipt) -> None:
        self.totals.add(receipt)
        if receipt.part is None:
            self.staged[index] = receipt.counters.reused + receipt.counters.rows
            if receipt.counters.rows:
                self.policy.progress(index)
            return
        self.staged.pop(index, None)
        self.policy.committed(index)
        self.milestones.commit()
        self.receipts[index] = receipt.part
        self.rows_committed += self.work[index]
        known = math.isfinite(self.pace)
        self.pace = (self.pace + receipt.seconds) / 2 if known else receipt.seconds

    def _lose(self, members: list[int], error: BaseException | None) -> None:
        """A lost task that several partitions shared tells nothing of any one of them."""
        # Dask's own words are five lines, and say no more.
        error = None if isinstance(error, KilledWorker) else error
        if self.stop.is_set():
            # Nobody is to blame: its worker may well have been told to leave, as this process was.
            self.todo.extend(members)
        elif len(members) > 1:
            log.warning(
                "%d partitions lost their task to %s; each goes on by itself", len(members), reason_of(error)
            )
            self._again_alone(members)
        else:
            self._strike(members[0], error)

    def _again_alone(self, members: list[int]) -> None:
        self.single.update(members)
        self.todo.extend(members)

    def _strike(self, index: int, error: BaseException | None) -> None:
        if self.policy.lost(index, error, len(self.in_flight) + 1):
            self.todo.append(index)

    def _poll(self, client: Client) -> dict[str, Any]:
        """Reads the workers' counters off the scheduler, shows them, and ends who hangs."""
        workers = look_at(client, self.workers)
        now, beats = self._show(workers)
        self.guard(now)
        for address, attempt, activity in beats.activity:
            self._end_if_stalled(client, address, attempt, activity)
        self.stalls.forget(self._members())
        return workers

    def _show(self, workers: dict[str, Any]) -> tuple[Progress, Heartbeats]:
        """Gives the callback the run's counters, those of tasks in flight included."""
        in_flight = self._members()
        totals = self.totals
        beats = heartbeats.read(workers, self.order.run, totals.counts, self._rows(in_flight))
        totals.see(beats)
        now = Progress(
            seconds=totals.seconds,
            partitions=self.layout.partitions,
            partitions_done=self._parts(),
            partitions_in_flight=len(in_flight),
            rows=self.plan.rows,
            rows_done=min(self.rows_committed + beats.covered, self.plan.rows),
            counts=beats.total,
            workers=len(workers),
            worker_time=dict(totals.worker_time),
            worker_views=beats.worker_views,
            engines=list(totals.engines.values()),
            slowest=totals.slowest,
            dashboard=self.dashboard,
        )
        self.on_progress(now)
        return now, beats

    def _members(self) -> set[int]:
        return {index for members in self.in_flight.values() for index in members}

    def _end_if_stalled(
        self, client: Client, worker: str, attempt: AttemptCounters, activity: Hashable
    ) -> None:
        """Ends a worker that hangs alive; its attempts are then judged like any lost ones."""
        if self.stalls.stalled(attempt.partition, (worker, activity), time.monotonic()):
            limit = self.job.limits.stall_seconds
            log.warning(
                "partition %d: no sign of progress for %g s; its worker is restarted",
                attempt.partition,
                limit,
            )
            tell(client, end_at_once, workers=[worker])

    def _wind_up(self, client: Client) -> None:
        """The end of a run that is not complete: what it has come to by then is shown once more, and so recorded."""
        self._drain(client)
        self._show(self.workers)

    def _drain(self, client: Client) -> None:
        """Lets the tasks in flight stage what they hold, for as long as that should take."""
        self.todo.clear()
        if client.status != "running":
            return
        began = time.monotonic()
        next_call = began
        while self.in_flight and (now := time.monotonic()) < began + DRAIN_TIMEOUT:
            if now >= next_call:
                tell(client, request_stop, self.order.run)
                next_call = now + STOP_EVERY
            try:
                future = self.finished.get(timeout=0.2)
            except queue.Empty:
                if now > began + OPENING and not self._holding(client):
                    break
                continue
            self._count_late(future)
        client.cancel(list(self.in_flight))

    def _holding(self, client: Client) -> bool:
        """Whether any task in flight may hold answers: others wait for a worker, or for one that opens a tokenizer."""
        self.workers = look_at(client, self.workers)
        rows = self._rows(self._members())
        beats = heartbeats.read(self.workers, self.order.run, self.totals.counts, rows)
        return any(attempt.may_hold_answers for _, attempt, _ in beats.activity)

    def _rows(self, partitions: Iterable[int]) -> dict[int, int]:
        """How many each of the partitions has."""
        return {index: self.plan.partitions[index].rows for index in partitions}

    def _count_late(self, future: Future) -> None:
        """Takes in what a task had done by the time it was told to stop; whatever else came of it is the next run's."""
        members = self.in_flight.pop(future, [])
        self.isolated_attempts.pop(future, None)
        try:
            outcome = self.reader.read(future)
        except Exception as error:
            self.totals.add_lost(error)
            return
        receipts = outcome if isinstance(outcome, list) else [outcome]
        for index, receipt in zip(members, receipts, strict=False):
            if isinstance(receipt, TaskReceipt):
                self._book(index, receipt)

    def _safe(self) -> str:
        if self.order.retry is not None:
            return f"{len(self.receipts):,} of {len(self.work):,} parts replaced"
        staged = sum(self.staged.values())
        return (
            f"{self.rows_committed + staged:,} of {self.plan.rows:,} rows are safe: {self.rows_committed:,} in "
            f"{self._parts():,} of {self.layout.partitions:,} parts, {staged:,} staged"
        )

    def _parts(self) -> int:
        """How many the output has, those of earlier runs included."""
        return self.layout.partitions - len(self.work) + len(self.receipts)
