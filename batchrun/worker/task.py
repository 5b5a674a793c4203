"""One partition on one worker: read, prompt, generate, stage, seal.

A task commits to storage by itself and returns a small receipt; nothing durable lies in Dask. Whatever ends it, a
signal, a crash, a scheduler that went away, the next attempt goes on from what is staged.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
import pyarrow as pa
from distributed import get_worker
from numpy.typing import NDArray

from batchrun.dataset.plan import carried_columns
from batchrun.dataset.rows import carried, carried_schema
from batchrun.engine.protocol import EngineStats, Sampling
from batchrun.errors import (
    BatchrunError,
    CorruptInput,
    EngineError,
    FaultCode,
    InternalError,
    RowFault,
    StorageError,
    is_bug,
)
from batchrun.output.attempt import Attempt, PartialAnswer, Receipt
from batchrun.output.failed_rows import FailedRows
from batchrun.output.replace import ReplacingAttempt
from batchrun.worker.answers import failed
from batchrun.worker.duplicates import Duplicates
from batchrun.worker.generation import AttemptCounters, Generation
from batchrun.worker.order import Task, TaskReceipt, WorkOrder
from batchrun.worker.state import worker_state

log = logging.getLogger(__name__)

# Seconds between two looks at whether the task is still wanted.
WANTED_EVERY = 0.5


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
        missing = _missing(attempt, task)
        if task.is_shared:
            counters.taken_over = int(np.count_nonzero(missing))
        else:
            counters.reused = attempt.restored
        poison_rows = {row: RowFault(FaultCode.WORKER_CRASH, why) for row, why in task.poison_rows.items()}
        if left := {row: fault for row, fault in poison_rows.items() if missing[row]}:
            missing[[*left]] = False
            answers = failed(left)
            counters.count(answers, attempt.name_of)
            attempt.add_failed(answers)
        if missing.any():
            stats, begun = _generate(order, task, attempt, counters, missing)
        if not attempt.covered:
            attempt.flush()
            attempt.keep(begun)
            is_shared = task.is_shared or counters.handed_over > 0
            if is_shared and not worker_state.is_stopped(order.run) and (part := attempt.open()):
                return receipt(part)
        if not attempt.covered:
            return receipt(None)
        sealing = time.monotonic()
        counters.doing = "sealing"
        with _staging(attempt):
            part = _seal(order, task, attempt, counters)
        counters.commits, counters.commit_seconds = 1, time.monotonic() - sealing
        if output.failed is not None and (part.summary.failed or order.retry is not None):
            failed_rows = FailedRows(attempt.folder, order.layout, output)
            failed_rows.update(task.partition.index, order.places(task))
        return receipt(part)


def examine(order: WorkOrder, task: Task) -> list[int]:
    """Proves that this worker can load the engine; the rows of the partition that nothing durable is there of."""
    with _counted(order, task):
        attempt = order.attempt(task.partition)
        if attempt.open():
            return []
        spec = worker_state.codec(order).engine
        health = worker_state.health(order, spec)
        with worker_state.engine(spec) as engine:
            health.check()
            try:
                engine.load()
            except EngineError as error:
                raise health.ended(error, get_worker().address) from None
        missing: list[int] = attempt.missing.tolist()
        return missing


@contextmanager
def _counted(order: WorkOrder, task: Task) -> Iterator[AttemptCounters]:
    """The task's counters, which the heartbeat carries for as long as this is open, and an error that ends it."""
    with worker_state.attempt(order.run, task.partition.index) as counters:
        counters.task = str(get_worker().get_current_task())
        try:
            yield counters
        except BatchrunError as error:
            error.counters = counters
            raise
        except Exception as error:
            if not is_bug(error):
                raise
            bug = InternalError.of(error, kept_by="the run's record in _job/runs/")
            bug.counters = counters
            raise bug from None


def _generate(
    order: WorkOrder, task: Task, attempt: Attempt, counters: AttemptCounters, missing: NDArray[np.bool_]
) -> tuple[EngineStats, Mapping[int, PartialAnswer]]:
    """Generates the missing rows, as far as they are wanted; the engine's counters and the rows that were begun."""
    codec = worker_state.codec(order)
    wanted = _wanted_check(order.run)
    alone = np.count_nonzero(missing) == 1
    begun: dict[int, PartialAnswer] = {}
    proved = False

    def generate(rows: NDArray[np.bool_]) -> bool:
        """Whether the engine finished any of the rows; those that it did are in the attempt."""
        tokens = order.job.generation.defaults.max_new_tokens
        generation = Generation(
            lambda columns: order.read(task, columns),
            attempt,
            codec,
            tokens,
            counters,
            rows,
            health.rows_to_blame,
            order.job.generation.samples,
            _duplicates(order, codec.engine.sampling),
            worker_state.answer_lengths(order.run),
            # They are the longest ones that were left, as a rule.
            is_first=task.is_shared,
        )
        try:
            sharing = worker_state.sharing(counters.task, generation.handover)
            with _staging(attempt), sharing:
                generation.run(engine, wanted)
            health.rows_to_blame = generation.rows_to_blame
        except EngineError as error:
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

    with worker_state.engine(codec.engine) as engine:
        health = worker_state.health(order, codec.engine)
        with health.in_doubt(wanted) as in_doubt:
            if in_doubt:
                proved = generate(health.one_of(attempt.partition, missing))
                attempt.flush()
                missing = missing & _missing(attempt, task)
        if missing.any():
            generate(missing)
        return engine.stats(), begun


def _duplicates(order: WorkOrder, sampling: Sampling) -> Duplicates | None:
    wanted = order.job.generation.deduplicate
    if wanted is False or order.job.generation.samples > 1:
        return None
    return Duplicates(worker_state.known_answers(order.run), sampling, is_merging_samples=wanted is True)


@contextmanager
def _staging(attempt: Attempt) -> Iterator[None]:
    """What was finished by the time that an error leaves this is staged, and so costs no second time."""
    try:
        yield
    except StorageError:
        raise
    except Exception:
        attempt.flush()
        raise


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
            wanted = state is not None and state.state not in ("cancelled", "resumed")
        return wanted and not worker_state.is_stopped(run)

    return check
