"""One partition on one worker: read, prompt, generate, stage, seal.

A task commits to storage by itself and returns a small receipt; nothing durable lies in Dask. Whatever ends it, a
signal, a crash, a scheduler that went away, the next attempt goes on from what is staged.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from distributed import Worker, WorkerPlugin, get_worker

from batchrun.dataset.plan import Partition, carried_columns
from batchrun.dataset.reader import Batch
from batchrun.dataset.source import DataFile
from batchrun.engine.process import EngineProcess
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.errors import ChangedError, EngineDied, RowFault, StorageError
from batchrun.job import Job
from batchrun.model import resolve
from batchrun.output.attempt import Attempt, Receipt
from batchrun.output.chunk import ANSWERS
from batchrun.output.layout import Layout
from batchrun.prepare import Texts, open_texts, read_rows
from batchrun.prompt.detokenizer import Detokenizer
from batchrun.storage import Folder

log = logging.getLogger(__name__)

ANSWER_BATCH = 512  # completions decoded together: large enough to amortize, small enough to be staged soon
EXAMPLES = 5
STRIKES = 3  # engine processes in a row that died before they finished a row
WANTED_EVERY = 0.5  # seconds between two looks at whether the task is still wanted
FLUSH_ON_EXIT = 8.0  # seconds that a worker told to leave waits for its tasks to stage what they hold


@dataclass(frozen=True)
class WorkOrder:
    """What every task of a run carries: the job, and the hashes that its parts are stamped with."""

    run: str
    job: Job
    schema: pa.Schema
    layout: Layout
    job_hash: str
    model_fingerprint: str

    def read(self, task: Task, columns: Sequence[str]) -> Iterator[Batch]:
        return read_rows(self.job, self.schema, task.partition, task.files, columns)


@dataclass(frozen=True)
class Task:
    """One partition and the files that it reads, by the numbers its slices use."""

    partition: Partition
    files: dict[int, DataFile]


@dataclass
class Tally:
    """An attempt's counters; the worker's heartbeat reads them while the task adds to them.

    `reused` rows had been staged by earlier attempts; `rows` are new, `failed` of them without an answer; `requests`
    went to the engine. Tokens are those of the new rows.
    """

    run: str
    partition: int
    reused: int = 0
    rows: int = 0
    failed: int = 0
    requests: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class TaskReceipt:
    """What a task tells the driver. `part` is None when it was told to stop before its partition was covered."""

    worker: str
    part: Receipt | None
    tally: Tally
    engine: EngineStats | None


_lock = threading.Lock()
_texts: dict[str, Texts] = {}
_engines: dict[str, EngineProcess] = {}
_running: dict[int, Tally] = {}
_stopped_runs: set[str] = set()
_leaving = threading.Event()


def run_partition(order: WorkOrder, task: Task) -> TaskReceipt:
    """Brings one partition to its committed part, or as far as it gets before it is told to stop.

    Raises:
        BatchrunError: a fault of storage, input or engine. What was staged stays.
    """
    job, partition = order.job, task.partition
    still_wanted = _wanted_check(order.run)
    tally = Tally(order.run, partition.index)
    folder = Folder(job.output.path, job.output.storage_options)
    attempt = Attempt(
        folder,
        order.layout,
        order.job_hash,
        partition.index,
        partition.rows,
        uuid.uuid4().hex[:12],
        job.output,
    )
    stats = None

    def receipt(part: Receipt | None) -> TaskReceipt:
        return TaskReceipt(get_worker().address, part, tally, stats)

    if part := attempt.open():
        return receipt(part)
    tally.reused = attempt.restored
    _running[id(tally)] = tally
    try:
        if not attempt.covered:
            stats = _generate_all(order, task, attempt, tally, still_wanted)
        if not attempt.covered:
            attempt.flush()
            return receipt(None)
        columns = carried_columns(job.input, order.schema)
        carried = (batch.records for batch in order.read(task, columns))
        return receipt(attempt.seal(carried, pa.schema([order.schema.field(name) for name in columns])))
    finally:
        del _running[id(tally)]


def _generate_all(
    order: WorkOrder, task: Task, attempt: Attempt, tally: Tally, still_wanted: Callable[[], bool]
) -> EngineStats:
    """Generates what is missing; goes on with a new engine process after one died, as long as rows get done."""
    texts = _texts_for(order)
    engine = _engine_for(texts.engine)
    deaths = 0
    while not attempt.covered and still_wanted():
        before = tally.rows
        try:
            _generate(order, task, attempt, texts, engine, tally, still_wanted)
        except EngineDied as error:
            deaths = 1 if tally.rows > before else deaths + 1
            if deaths >= STRIKES:
                raise
            log.warning("partition %d: %s; a new engine goes on", tally.partition, error.what)
    return engine.stats()


def _generate(
    order: WorkOrder,
    task: Task,
    attempt: Attempt,
    texts: Texts,
    engine: EngineProcess,
    tally: Tally,
    still_wanted: Callable[[], bool],
) -> None:
    missing = np.zeros(task.partition.rows, dtype=bool)
    missing[attempt.missing] = True
    lengths = np.zeros(task.partition.rows, dtype=np.int32)
    done: list[Completion] = []
    faults: list[tuple[int, RowFault]] = []

    def requests() -> Iterator[Request]:
        max_new_tokens = order.job.generation.max_new_tokens
        for batch in order.read(task, texts.builder.columns):
            wanted = np.flatnonzero(missing[batch.first : batch.first + batch.records.num_rows])
            if not len(wanted):
                continue
            whole = len(wanted) == batch.records.num_rows
            records = batch.records if whole else batch.records.take(pa.array(wanted))
            rows = (batch.first + wanted).tolist()
            seeds = batch.row_ids[wanted].view(np.int64).tolist()
            for row, seed, prompt in zip(rows, seeds, texts.builder.build(records), strict=True):
                if isinstance(prompt, RowFault):
                    faults.append((row, prompt))
                    continue
                lengths[row] = len(prompt)
                tally.requests += 1
                yield Request(row, prompt, max_new_tokens, seed)

    def settle() -> None:
        for answers in (_answers(done, lengths, texts.detokenizer), _faulty(faults)):
            if answers is not None:
                _count(tally, answers)
                attempt.add(answers)
        done.clear()
        faults.clear()
        attempt.maybe_flush()

    try:
        with contextlib.closing(engine.generate(requests())) as completions:
            for completion in completions:
                if completion is not None:
                    done.append(completion)
                    if len(done) < ANSWER_BATCH:
                        continue
                settle()
                if not still_wanted():
                    break
    except StorageError:
        raise  # minutes of patience went into that flush; another would only be waited for as long
    except BaseException:
        settle()  # what was finished before the engine died is not generated again
        raise
    settle()


def _answers(done: list[Completion], lengths: np.ndarray, detokenizer: Detokenizer) -> pa.Table | None:
    if not done:
        return None
    rows = np.fromiter((c.id for c in done), np.int64, len(done))
    texts: list[str | None] = list(detokenizer.decode([c.token_ids for c in done]))
    failed = [i for i, c in enumerate(done) if c.fault is not None]
    for i in failed:
        texts[i] = None
    return _table(
        rows=rows,
        answer=texts,
        finish_reason=[c.finish_reason for c in done],
        prompt_tokens=lengths[rows],
        output_tokens=np.fromiter((len(c.token_ids) for c in done), np.int32, len(done)),
        error=[None if c.fault is None else str(c.fault) for c in done],
    )


def _faulty(faults: list[tuple[int, RowFault]]) -> pa.Table | None:
    if not faults:
        return None
    return _table(
        rows=np.array([row for row, _ in faults], np.int64),
        answer=[None] * len(faults),
        finish_reason=["error"] * len(faults),
        prompt_tokens=np.zeros(len(faults), np.int32),
        output_tokens=np.zeros(len(faults), np.int32),
        error=[str(fault) for _, fault in faults],
    )


def _table(
    rows: np.ndarray,
    answer: list[str | None],
    finish_reason: list[str],
    prompt_tokens: np.ndarray,
    output_tokens: np.ndarray,
    error: list[str | None],
) -> pa.Table:
    columns = {
        "row": rows,
        "answer": answer,
        "finish_reason": finish_reason,
        "prompt_tokens": prompt_tokens,
        "output_tokens": output_tokens,
        "status": ["ok" if e is None else "failed" for e in error],
        "error": error,
    }
    return pa.table([pa.array(columns[f.name], f.type) for f in ANSWERS], schema=ANSWERS)


def _count(tally: Tally, answers: pa.Table) -> None:
    errors = answers["error"].drop_null()
    tally.rows += answers.num_rows
    tally.failed += len(errors)
    tally.prompt_tokens += int(np.sum(answers["prompt_tokens"].to_numpy()))
    tally.output_tokens += int(np.sum(answers["output_tokens"].to_numpy()))
    if len(tally.examples) < EXAMPLES and len(errors):
        failed = answers.filter(answers["error"].is_valid()).slice(0, EXAMPLES - len(tally.examples))
        tally.examples += tuple(
            f"partition {tally.partition}, row {row}: {error}"
            for row, error in zip(failed["row"].to_pylist(), failed["error"].to_pylist(), strict=True)
        )


def _texts_for(order: WorkOrder) -> Texts:
    with _lock:
        # Budgets of the engine decide no output, yet a living worker must heed a change of them.
        key = f"{order.job_hash} {order.job.engine.model_dump_json()}"
        if key not in _texts:
            model = resolve(order.job.model)
            if model.fingerprint != order.model_fingerprint:
                raise ChangedError(
                    "the model on this worker differs from the driver's",
                    order.job.model.name,
                    "give every machine the same model folder",
                )
            _texts.clear()  # a worker runs one job at a time as a rule, and tokenizers are large
            _texts[key] = open_texts(order.job, model, order.schema)
        return _texts[key]


def _engine_for(spec: EngineSpec) -> EngineProcess:
    """The worker's engine process for this specification; idle ones of other jobs make room for it."""
    key = repr(asdict(spec))
    with _lock:
        if key not in _engines:
            for other in [k for k, engine in _engines.items() if engine.idle]:
                _engines.pop(other).stop()
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
            wanted = not (cancelled or _leaving.is_set() or run in _stopped_runs)
        return wanted

    return check


async def request_stop(run: str) -> None:
    """Run on every worker when the driver was interrupted: tasks of this run flush and return."""
    _stopped_runs.add(run)


def snapshot(dask_worker: Worker) -> dict[str, Any]:
    """The worker's part of the heartbeat: plain values of all running tasks and of the engine."""
    engines = [asdict(engine.stats()) for engine in list(_engines.values())]
    return {"tasks": [asdict(tally) for tally in list(_running.values())], "engines": engines}


class BatchrunPlugin(WorkerPlugin):
    """Registered once per run: hooks the heartbeat, and lets a leaving worker stage what it holds."""

    name = "batchrun"
    idempotent = True

    def setup(self, worker: Worker) -> None:
        worker.metrics["batchrun"] = snapshot
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C reaches the whole process group; the driver decides what it means for a worker.
            signal.signal(signal.SIGINT, signal.SIG_IGN)

    async def teardown(self, worker: Worker) -> None:
        _leaving.set()
        deadline = time.monotonic() + FLUSH_ON_EXIT
        while _running and time.monotonic() < deadline:
            await asyncio.sleep(0.05)
        for engine in list(_engines.values()):
            engine.stop()
