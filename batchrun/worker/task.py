"""One partition on one worker: read, prompt, generate, stage, seal.

A task commits to storage by itself and returns a small receipt; nothing durable lies in Dask. Whatever ends it, a
signal, a crash, a scheduler that went away, the next attempt goes on from what is staged.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
from distributed import Worker, WorkerPlugin, get_worker
from numpy.typing import NDArray

from batchrun.dataset.names import RowNames
from batchrun.dataset.plan import Partition, carried_columns
from batchrun.dataset.reader import RowBatch
from batchrun.dataset.rows import Places, carried, carried_schema, places_of, read_rows
from batchrun.dataset.source import DataFile
from batchrun.engine.process import EngineProcess
from batchrun.engine.protocol import EngineSpec, EngineStats
from batchrun.errors import (
    BatchrunError,
    ChangedError,
    CorruptInput,
    EngineError,
    FaultCode,
    RowFault,
    StorageError,
)
from batchrun.job.job import Job
from batchrun.model.folder import resolve
from batchrun.model.light import import_tokenizers
from batchrun.output.attempt import Attempt, PartialAnswer, Receipt
from batchrun.output.failed_rows import update as update_failed
from batchrun.output.layout import Layout
from batchrun.output.replace import ReplacingAttempt
from batchrun.output.retry import Retry
from batchrun.prompt.codec import PromptCodec, open_codec
from batchrun.storage import Folder, deadline
from batchrun.telemetry.gpu import gpu_now
from batchrun.worker.answers import failed
from batchrun.worker.engine_health import EngineHealth
from batchrun.worker.generation import AttemptCounters, Generation

log = logging.getLogger(__name__)

WANTED_EVERY = 0.5  # seconds between two looks at whether the task is still wanted
FLUSH_ON_EXIT = (
    8.0  # seconds that a worker told to leave waits for its tasks to stage what they hold; 3 as a rule
)


@dataclass(frozen=True)
class WorkOrder:
    """What every task of a run carries: the job, and the hashes that its parts are stamped with."""

    run: str
    job: Job
    schema: pa.Schema
    layout: Layout
    job_hash: str
    model_fingerprint: str
    retry: Retry | None = None

    def attempt(self, partition: Partition) -> Attempt:
        """A new attempt at the partition, or in a retry at the part that it has."""
        output = self.job.output
        folder = Folder(output.path, output.storage_options)
        place = (partition.index, partition.rows, uuid.uuid4().hex[:12], output)
        if self.retry is None:
            attempt = Attempt(folder, self.layout, self.job_hash, *place)
        else:
            attempt = ReplacingAttempt(folder, self.layout, *place, self.retry)
        attempt.answers = self.job.answer.format
        return attempt

    def read(self, task: Task, columns: Sequence[str]) -> Iterator[RowBatch]:
        return read_rows(self.job, self.schema, task.partition, task.files, columns)

    def names(self, task: Task) -> RowNames:
        return RowNames(task.partition, task.files, self.job.input, lambda: self.read(task, ()))

    def places(self, task: Task) -> Places:
        return lambda _: places_of(self.job, self.schema, task.partition, task.files)


@dataclass(frozen=True)
class Task:
    """One partition and the files that it reads, by the numbers its slices use.

    With `rows`, only these are generated. `poison_rows` rows go to no engine; each has the reason that is its error.
    `proven` says that engines have finished rows of this output before: what kills one may then be the row that it has.
    """

    partition: Partition
    files: dict[int, DataFile]
    rows: Sequence[int] | None = None
    poison_rows: Mapping[int, str] = field(default_factory=dict)
    proven: bool = False


@dataclass(frozen=True)
class TaskReceipt:
    """What a task tells the driver. `part` is None when it was told to stop before its partition was covered."""

    worker: str
    part: Receipt | None
    counters: AttemptCounters
    engine: EngineStats | None
    seconds: float


_lock = threading.Lock()
_codecs: dict[str, PromptCodec] = {}
_engines: dict[str, EngineProcess] = {}
_health: dict[str, EngineHealth] = {}  # of the engines, by the same keys
_running: dict[int, AttemptCounters] = {}
_stopped_runs: set[str] = set()
_opening = threading.Event()
_leaving = threading.Event()
_leave_tasks: set[asyncio.Task[Any]] = set()  # the loop itself holds no task


def run_partitions(order: WorkOrder, tasks: Sequence[Task], seconds: float) -> list[TaskReceipt]:
    """Works off partitions one after the other, and begins none any more after `seconds`.

    Those left without a receipt, from the first one that fails on, the driver sends again one by one.

    Raises:
        BatchrunError: the first of them failed.
    """
    started = time.monotonic()
    receipts = [run_partition(order, tasks[0])]
    for task in tasks[1:]:
        if receipts[-1].part is None or time.monotonic() - started > seconds:
            break
        try:
            receipts.append(run_partition(order, task))
        except BatchrunError as error:
            log.warning("partition %d is tried again by itself: %s", task.partition.index, error)
            break
    return receipts


def run_partition(order: WorkOrder, task: Task) -> TaskReceipt:
    """Brings one partition to its committed part, or as far as it gets before it is told to stop.

    Raises:
        BatchrunError: a fault of storage, input or engine. What was finished is staged.
    """
    started = time.monotonic()
    output = order.job.output
    stats = None
    begun: Mapping[int, PartialAnswer] = {}

    def receipt(part: Receipt | None) -> TaskReceipt:
        return TaskReceipt(get_worker().address, part, counters, stats, time.monotonic() - started)

    with _counted(order, task) as counters:
        attempt = order.attempt(task.partition)
        attempt.name_of = order.names(task)
        if part := attempt.open():
            return receipt(part)
        counters.reused = attempt.restored
        missing = _missing(attempt, task)
        poison_rows = {row: RowFault(FaultCode.WORKER_CRASH, why) for row, why in task.poison_rows.items()}
        if left := {row: fault for row, fault in poison_rows.items() if missing[row]}:
            missing[[*left]] = False
            answers = failed(left)
            counters.count(answers, attempt.name_of)
            attempt.add(answers)
        if missing.any():
            stats, begun = _generate(order, task, attempt, counters, missing)
        if not attempt.covered:
            attempt.flush()
            attempt.keep(begun)
            return receipt(None)
        sealing = time.monotonic()
        counters.doing = "sealing"
        part = _seal(order, task, attempt, counters)
        counters.commits, counters.commit_seconds = 1, time.monotonic() - sealing
        if output.failed is not None and (part.summary.failed or order.retry is not None):
            update_failed(attempt.folder, order.layout, task.partition.index, output, order.places(task))
        return receipt(part)


def examine(order: WorkOrder, task: Task) -> list[int]:
    """Proves that this worker can load the engine; the rows of the partition that nothing durable is there of."""
    with _counted(order, task):
        attempt = order.attempt(task.partition)
        if attempt.open():
            return []
        spec = _codec_for(order).engine
        health = _health_for(order, spec)
        with _engine_for(spec) as engine:
            health.check()
            try:
                engine.load()
            except EngineError as error:
                raise health.ended(error, get_worker().address) from None
        missing: list[int] = attempt.missing.tolist()
        return missing


@contextmanager
def _counted(order: WorkOrder, task: Task) -> Iterator[AttemptCounters]:
    """The task's counters, which the heartbeat carries for as long as this is open."""
    counters = AttemptCounters(run=order.run, partition=task.partition.index)
    _running[id(counters)] = counters
    try:
        with deadline.until(lambda: order.run in _stopped_runs or _leaving.is_set()):
            yield counters
    except BatchrunError as error:
        error.counters = counters
        raise
    finally:
        del _running[id(counters)]


def _generate(
    order: WorkOrder, task: Task, attempt: Attempt, counters: AttemptCounters, missing: NDArray[np.bool_]
) -> tuple[EngineStats, Mapping[int, PartialAnswer]]:
    """Generates the missing rows, as far as they are wanted; the engine's counters and the rows that were begun."""
    spec = _codec_for(order).engine
    with _engine_for(spec) as engine:
        return _generate_with(engine, _health_for(order, spec), order, task, attempt, counters, missing)


def _generate_with(
    engine: EngineProcess,
    health: EngineHealth,
    order: WorkOrder,
    task: Task,
    attempt: Attempt,
    counters: AttemptCounters,
    missing: NDArray[np.bool_],
) -> tuple[EngineStats, Mapping[int, PartialAnswer]]:
    wanted = _wanted_check(order.run)
    alone = np.count_nonzero(missing) == 1
    begun: dict[int, PartialAnswer] = {}
    proved = False

    def generate(rows: NDArray[np.bool_]) -> bool:
        """Whether the engine finished any of the rows; those that it did are in the attempt."""
        codec, tokens = _codec_for(order), order.job.generation.max_new_tokens
        generation = Generation(
            lambda columns: order.read(task, columns), attempt, codec, tokens, counters, rows
        )
        try:
            generation.run(engine, wanted)
        except StorageError:
            raise
        except Exception as error:
            attempt.flush()  # what was finished before costs no second time
            if not isinstance(error, EngineError):
                raise
            if generation.answered:
                health.progress(error.launch)
            counts = not (alone and task.proven)
            ended = health.ended(error, get_worker().address, counts)
            ended.proved = proved and not generation.answered
            raise ended from None
        begun.update(generation.begun)
        if generation.answered:
            health.progress(engine.launches)
        return generation.answered > 0

    with health.in_doubt(wanted) as in_doubt:
        if in_doubt:
            proved = generate(health.one_of(attempt.partition, missing))
            attempt.flush()
            missing = missing & _missing(attempt, task)
    if missing.any():
        generate(missing)
    return engine.stats(), begun


def _missing(attempt: Attempt, task: Task) -> NDArray[np.bool_]:
    """(rows,) which ones this task is to bring about."""
    missing = np.zeros(attempt.rows, bool)
    missing[attempt.missing] = True
    if task.rows is not None:
        missing &= np.isin(np.arange(attempt.rows), [*task.rows, *task.poison_rows])
    return missing


def _seal(order: WorkOrder, task: Task, attempt: Attempt, counters: AttemptCounters) -> Receipt:
    if isinstance(attempt, ReplacingAttempt):
        return attempt.seal(attempt.carried.to_batches(), attempt.carried.schema)
    columns = carried_columns(order.job.input, order.schema, order.job.output.partition_by)
    fields = pa.schema([order.schema.field(name) for name in columns], metadata=order.schema.metadata)
    schema = carried_schema(fields, order.job)

    def carry(known: Mapping[int, RowFault] | None) -> Iterator[pa.RecordBatch]:
        for batch in order.read(task, columns):
            counters.activity += 1
            rows = range(batch.first, batch.first + batch.records.num_rows)
            if batch.fault is not None and (known is None or not all(row in known for row in rows)):
                raise CorruptInput(batch.fault.message)
            yield carried(batch, task.files, order.job)

    try:
        return attempt.seal(carry(None), schema)
    except CorruptInput:
        lost = {
            row: batch.fault
            for batch in order.read(task, columns)
            if batch.fault is not None
            for row in range(batch.first, batch.first + batch.records.num_rows)
        }
    # An answer beside input that cannot be carried along would be read as that of a row of nulls.
    attempt.overwrite(failed(lost))
    nullable = pa.schema([field.with_nullable(True) for field in schema], metadata=schema.metadata)
    return attempt.seal(carry(lost), nullable)


def _codec_for(order: WorkOrder) -> PromptCodec:
    with _lock:
        # Budgets of the engine decide no output, yet a living worker must heed a change of them.
        key = f"{order.job_hash} {order.job.engine.model_dump_json()}"
        if key not in _codecs:
            _opening.set()
            try:
                model = resolve(order.job.model)
                codec = open_codec(order.job, model, order.schema)
                if model.fingerprint != order.model_fingerprint:
                    raise ChangedError(
                        "the model on this worker differs from the driver's",
                        order.job.model.name,
                        "give every machine the same model folder",
                    )
                _codecs.clear()  # a worker runs one job at a time as a rule, and tokenizers are large
                _codecs[key] = codec
            finally:
                _opening.clear()
        return _codecs[key]


@contextmanager
def _engine_for(spec: EngineSpec) -> Iterator[EngineProcess]:
    """The worker's engine process for this specification, kept while this is open.

    Idle ones of other jobs make room for it.
    """
    with ExitStack() as held:
        with _lock:
            engine = held.enter_context(_engine(repr(asdict(spec)), spec).in_use())
        yield engine


def _health_for(order: WorkOrder, spec: EngineSpec) -> EngineHealth:
    """That of the engine in this run."""
    key = repr(asdict(spec))
    with _lock:
        if key not in _health or _health[key].run != order.run:
            folder = Folder(order.job.output.path, order.job.output.storage_options)
            _health[key] = EngineHealth(order.run, folder, order.job.secrets())
        return _health[key]


def _engine(key: str, spec: EngineSpec) -> EngineProcess:
    """The one for this specification, new or not. Whoever calls holds the lock."""
    if key not in _engines:
        for other in [k for k, engine in _engines.items() if engine.idle]:
            _engines.pop(other).stop()
            _health.pop(other, None)
        _engines[key] = EngineProcess(spec)
    return _engines[key]


def _wanted_check(run: str) -> Callable[[], bool]:
    """Whether the current task should go on: looked up at most twice a second.

    Retirement, cancellation and a lost scheduler never stop a running thread; it has to look for itself.
    """
    worker, key = get_worker(), get_worker().get_current_task()
    last = 0.0
    wanted = True

    def check() -> bool:
        nonlocal last, wanted
        now = time.monotonic()
        if now - last >= WANTED_EVERY:
            last = now
            state = worker.state.tasks.get(key)
            cancelled = state is None or state.state in ("cancelled", "resumed")
            wanted = not (cancelled or run in _stopped_runs)
        return wanted and not _leaving.is_set()

    return check


async def start_engine(spec: EngineSpec) -> None:
    """Run on the workers of this machine at a run's start: the engine loads before the first task comes."""

    def start() -> None:
        with _lock:
            engine = _engine(repr(asdict(spec)), spec)
        engine.start()
        # The first task would wait for it.
        import_tokenizers()

    # Not on the event loop, which must never wait for a task that holds the lock.
    threading.Thread(target=start, name="batchrun-start", daemon=True).start()


async def request_stop(run: str) -> None:
    """Run on every worker when the driver was interrupted: tasks of this run flush and return."""
    _stopped_runs.add(run)


async def end_at_once() -> None:
    """Run on a worker that hangs: its nanny, or whoever started it, starts another one."""
    os.kill(os.getpid(), signal.SIGKILL)


def snapshot(dask_worker: Worker) -> dict[str, Any]:
    """The worker's part of the heartbeat: plain values of all running tasks, of the engine and of the GPU.

    `loading` is the CPU time of what has no counters yet: engines, and this process while it opens a tokenizer.
    """
    engines = list(_engines.values())
    gpu = gpu_now()
    own = time.process_time() if _opening.is_set() else 0.0
    return {
        "tasks": [asdict(counters) for counters in list(_running.values())],
        "engines": [asdict(engine.stats()) for engine in engines],
        "loading": own + sum(engine.loading_seconds() for engine in engines),
        "gpu": asdict(gpu) if gpu else None,
    }


async def _stop_work() -> None:
    """Tasks stage what they hold and return; then the engines end."""
    _leaving.set()
    deadline = time.monotonic() + FLUSH_ON_EXIT
    while _running and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    for engine in list(_engines.values()):
        engine.stop()


async def _leave() -> None:
    """On SIGTERM, which a nanny's worker would die of at once. Whether another one takes its place is the nanny's
    decision; a worker that closes by itself it would take for one that is not wanted any more."""
    await _stop_work()
    os._exit(128 + signal.SIGTERM)


class BatchrunPlugin(WorkerPlugin):
    """Registered once per run: hooks the heartbeat, and lets a leaving worker stage what it holds."""

    name = "batchrun"
    idempotent = True

    def setup(self, worker: Worker) -> None:
        worker.metrics["batchrun"] = snapshot
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C and a closed terminal reach the whole process group; the driver decides what that means here.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGTERM, lambda: _leave_tasks.add(loop.create_task(_leave())))

    async def teardown(self, worker: Worker) -> None:
        await _stop_work()
