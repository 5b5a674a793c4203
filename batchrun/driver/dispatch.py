"""A plan onto Dask: the window in flight, lost attempts, stops."""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
import uuid
from collections.abc import Hashable, Iterable
from dataclasses import replace
from typing import Any

from distributed import Client, Future, KilledWorker

from batchrun import signals
from batchrun.cluster import dashboard
from batchrun.driver import heartbeats
from batchrun.driver.handovers import Handovers
from batchrun.driver.heartbeats import Heartbeats
from batchrun.driver.lost_attempts import IsolatedAttempt, LostAttemptPolicy, reason_of
from batchrun.driver.partitions import TASK_SECONDS, Partitions
from batchrun.driver.prepare import Prepared
from batchrun.driver.receipts import ReceiptReader
from batchrun.driver.staged import Unheard, unheard
from batchrun.driver.stalls import Stalls
from batchrun.driver.tail import Tail
from batchrun.driver.totals import RunTotals
from batchrun.driver.trials import Trials
from batchrun.driver.window import Window
from batchrun.driver.workers import look_at, register_plugin, tell
from batchrun.errors import CorruptInput, InternalError, Interrupted, Refused, StorageError
from batchrun.output.retry import Retry
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import Progress, ProgressCallback, silent
from batchrun.worker.generation import AttemptCounters
from batchrun.worker.order import Task, TaskReceipt, WorkOrder
from batchrun.worker.plugin import end_at_once, request_stop
from batchrun.worker.task import run_partitions

log = logging.getLogger(__name__)

# Tasks in flight per slot: no slot waits, and a worker that joins finds work left.
IN_FLIGHT_PER_SLOT = 1.25
# Seconds between two looks at the workers' counters.
POLL = 1.0
# Seconds that tasks have to stage what they hold after a stop.
DRAIN_TIMEOUT = 30.0
# Seconds between two calls to stop: workers come meanwhile, and take up what others have lost.
STOP_EVERY = 0.5
# Seconds after a stop from which on only tasks that hold rows are waited for.
OPENING = 2.5
# Errors of a partition that end the run; others lose the attempt.
FATAL_ERRORS = (Refused, StorageError, CorruptInput, InternalError)


class Dispatch:
    """The partitions of one run between storage and Dask: those `in_flight`, and what came of them.

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
        self.gpus = prepared.gpus
        self.layout = replace(prepared.layout, generation=0 if retry is None else retry.number)
        self.partitions = Partitions(prepared.plan, work)
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
        self.window = Window(self.order)
        self.in_flight, self.finished = self.window.tasks, self.window.finished
        self.policy = LostAttemptPolicy(
            self.plan, self.folder, self.layout, proven=self.partitions.rows_committed > 0
        )
        self.stalls = Stalls(self.job.limits.stall_seconds)
        self.trials = Trials(self.policy, self.window)
        self.tail = Tail(lambda index: self.plan.partitions[index].rows)
        self.handovers = Handovers(self.tail, self.window, self._task)
        self.workers: dict[str, Any] = {}
        self.unheard = Unheard()
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
        while self.partitions.todo or self.in_flight or self.policy.suspected:
            if self.stop.is_set():
                raise Interrupted("stopped")
            if client.status != "running":
                raise ConnectionError("no connection to the Dask scheduler")
            if time.monotonic() >= next_poll:
                self.workers = self._poll(client)
                self.policy.check_engines(self.workers)
                next_poll = time.monotonic() + POLL
            self._fill(client, self.workers)
            if not self.partitions.todo:
                self.trials.begin(client, self.workers)
            self._share(client, self.workers)
            self._settle(POLL / 4)
        self._poll(client)

    def _fill(self, client: Client, workers: dict[str, Any]) -> None:
        able = self.policy.able(workers)
        for members in self.window.free_kept(workers):
            self._requeue(members)
        slots = sum(workers[name]["nthreads"] for name in able)
        # What waits at Dask is bound to a worker: the last ones wait here for whichever is free first.
        todo = self.partitions.todo
        ahead = IN_FLIGHT_PER_SLOT if len(todo) > slots else 1.0
        window = max(1, math.ceil(ahead * slots)) if able or not workers else 0
        while todo and len(self.in_flight) < window:
            members = self.partitions.take(window)
            tasks = [self._task(index) for index in members]
            some = None if len(able) == len(workers) else able
            future = self.window.submit(client, members, run_partitions, tasks, TASK_SECONDS, workers=some)
            if some is not None:
                self.window.kept[future] = some

    def _task(self, index: int) -> Task:
        partition = self.plan.partitions[index]
        return Task(partition, self.plan.files_of(partition), proven=self.policy.proven)

    def _share(self, client: Client, workers: dict[str, Any]) -> None:
        """Once nothing is left to begin with, workers with free slots take over rows of others' partitions."""
        self.handovers.begin(client)
        if not self.partitions.todo and self.order.retry is None:
            slots = {name: workers[name]["nthreads"] for name in self.policy.able(workers)}
            tasks = {future.key for future, members in self.in_flight.items() if len(members) == 1}
            tasks.difference_update(future.key for future in self.trials.running)
            self.handovers.ask(client, slots, tasks)

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
            self.trials.go_on(future.client, self.policy.examined(isolated, outcome))

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
        is_shared = self.handovers.end(future)
        if isolated := self.trials.running.pop(future, None):
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
                self._lose(members, lost, is_shared)
                return
            for index, receipt in zip(members, receipts, strict=False):
                self._book(index, receipt)
                if receipt.part is None:
                    self._requeue([index])
            self._again_alone(members[len(receipts) :])
            return
        error = future.exception() if future.status == "error" else None
        if isinstance(error, FATAL_ERRORS):
            self.totals.add_lost(error)
            raise error
        self._lose(members, error, is_shared)

    def _requeue(self, members: Iterable[int]) -> None:
        """Attempts at these partitions ended without a part. Where another one goes on, that one's end decides."""
        self.partitions.put_back(members, self.window.partitions.union(self.policy.suspected))

    def _book(self, index: int, receipt: TaskReceipt) -> None:
        self.totals.add(receipt)
        self.tail.book(receipt)
        if receipt.part is None:
            counters = receipt.counters
            self.partitions.stage(index, counters.reused + counters.rows)
            if counters.rows:
                self.policy.progress(index)
            return
        self.policy.committed(index)
        if self.partitions.commit(index, receipt.part, receipt.seconds):
            self.milestones.commit()

    def _lose(self, members: list[int], error: BaseException | None, is_shared: bool) -> None:
        """A lost task that several partitions shared tells nothing of any one of them. Nor does one that had taken over
        some rows: who left them goes on, and the rows come again with the partition, which stays whole then."""
        for index in members:
            self.tail.keep_whole(index)
        # Dask's own words are five lines, and say no more.
        error = None if isinstance(error, KilledWorker) else error
        if self.stop.is_set():
            # Nobody is to blame: its worker may well have been told to leave, as this process was.
            self._requeue(members)
        elif is_shared:
            self.policy.note_engine(error)
            log.warning("partition %d lost rows taken over: %s; they go on", members[0], reason_of(error))
            self._requeue(members)
        elif len(members) > 1:
            log.warning(
                "%d partitions lost their task: %s; each goes on by itself", len(members), reason_of(error)
            )
            self._again_alone(members)
        else:
            self._strike(members[0], error)

    def _again_alone(self, members: list[int]) -> None:
        self.partitions.keep_single(members)
        self._requeue(members)

    def _strike(self, index: int, error: BaseException | None) -> None:
        if index not in self.partitions.receipts and self.policy.lost(index, error, len(self.in_flight) + 1):
            self._requeue([index])

    def _poll(self, client: Client) -> dict[str, Any]:
        """Reads the workers' counters off the scheduler, shows them, and ends who hangs."""
        workers = look_at(client, self.workers)
        now, beats = self._show(workers)
        self.guard(now)
        for address, attempt, activity in beats.activity:
            self._end_if_stalled(client, address, attempt, activity)
        self.stalls.forget(self.window.partitions)
        return workers

    def _show(self, workers: dict[str, Any]) -> tuple[Progress, Heartbeats]:
        """Gives the callback the run's counters, those of tasks in flight included."""
        in_flight = self.window.partitions
        totals = self.totals
        beats = heartbeats.read(workers, self.order.run, totals.counts, self.partitions.rows(in_flight))
        totals.see(beats)
        self.tail.see(time.monotonic(), beats, {future.key for future in self.in_flight})
        staged = sum(self.partitions.staged.values())
        now = Progress(
            seconds=totals.seconds,
            partitions=self.layout.partitions,
            partitions_done=self.partitions.parts,
            partitions_in_flight=len(in_flight),
            rows=self.plan.rows,
            rows_done=min(self.partitions.rows_committed + beats.covered + staged, self.plan.rows),
            counts=beats.total,
            workers=len(workers),
            gpus_per_worker=self.gpus,
            worker_time=dict(totals.worker_time),
            worker_views=beats.worker_views,
            engines=list(totals.engines.values()),
            slowest=totals.slowest,
            dashboard=self.dashboard,
        )
        self.on_progress(now)
        return now, beats

    def _end_if_stalled(
        self, client: Client, worker: str, attempt: AttemptCounters, activity: Hashable
    ) -> None:
        """Ends a worker that hangs alive; its attempts are then judged like any lost ones."""
        if self.stalls.stalled(attempt.partition, activity, time.monotonic(), attempt.task):
            limit = self.job.limits.stall_seconds
            log.warning(
                "partition %d: no sign of progress for %g s; its worker is restarted",
                attempt.partition,
                limit,
            )
            tell(client, end_at_once, workers=[worker])

    def _wind_up(self, client: Client) -> None:
        """The end of a run that is not complete: what it has come to by then is shown once more, and so recorded."""
        began = time.monotonic()
        self._drain(client)
        if self.order.retry is None:
            self.unheard = unheard(self.order, self.plan, self.folder, self.partitions.untold, began)
        self._show(self.workers)

    def _drain(self, client: Client) -> None:
        """Lets the tasks in flight stage what they hold, for as long as that should take."""
        self.partitions.todo.clear()
        if client.status != "running":
            return
        began = time.monotonic()
        next_call = began
        while self.in_flight and (now := time.monotonic()) < began + DRAIN_TIMEOUT:
            if now >= next_call:
                tell(client, request_stop, self.order.run)
                # It may have taken as long: receipts are read between two calls.
                next_call = time.monotonic() + STOP_EVERY
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
        rows = self.partitions.rows(self.window.partitions)
        beats = heartbeats.read(self.workers, self.order.run, self.totals.counts, rows)
        return any(attempt.may_hold_answers for _, attempt, _ in beats.activity)

    def _count_late(self, future: Future) -> None:
        """Takes in what a task had done by the time it was told to stop; whatever else came of it is the next run's."""
        if future not in self.in_flight:
            return
        members = self.in_flight.pop(future)
        self.trials.running.pop(future, None)
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
        done = self.partitions
        if self.order.retry is not None:
            return f"{len(done.receipts):,} of {len(done.work):,} parts replaced"
        return self.unheard.told(self.plan, done.work, done.rows_committed, done.parts, done.staged)
