"""What a worker's process holds for all of its tasks: tokenizers, engines and their health, and what goes on."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict

from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import EngineSpec
from batchrun.errors import ChangedError
from batchrun.model.folder import resolve
from batchrun.prompt.codec import PromptCodec, open_codec
from batchrun.storage import Folder, deadline
from batchrun.worker.answer_lengths import AnswerLengths
from batchrun.worker.duplicates import KnownAnswers
from batchrun.worker.engine_health import EngineHealth
from batchrun.worker.generation import AttemptCounters
from batchrun.worker.handover import Handover
from batchrun.worker.order import WorkOrder


class WorkerState:
    """One for each process: `worker_state`. Tasks, the heartbeat and signals use it, each in a thread of its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._codecs: dict[str, PromptCodec] = {}
        self._engines: dict[str, EngineProcess] = {}
        # Of the engines, by the same keys.
        self._health: dict[str, EngineHealth] = {}
        self._answers: dict[str, KnownAnswers] = {}
        self._lengths: dict[str, AnswerLengths] = {}
        self._attempts: dict[int, AttemptCounters] = {}
        # By task: where the driver may ask for rows.
        self._handovers: dict[str, Handover] = {}
        self._stopped_runs: set[str] = set()
        self._opening = threading.Event()
        self._leaving = threading.Event()

    @property
    def attempts(self) -> list[AttemptCounters]:
        """The counters of the attempts that go on now."""
        return list(self._attempts.values())

    @property
    def engines(self) -> list[EngineProcess]:
        """The engines that were started, or are about to be."""
        return list(self._engines.values())

    @property
    def loading_seconds(self) -> float:
        """CPU time of what has no counters yet: engines, and this process while it opens a tokenizer."""
        own = time.process_time() if self._opening.is_set() else 0.0
        return own + sum(engine.loading_seconds() for engine in self.engines)

    @contextmanager
    def attempt(self, run: str, partition: int) -> Iterator[AttemptCounters]:
        """The counters of an attempt, which goes on for as long as this is open. The store's patience ends with it
        being stopped."""
        counters = AttemptCounters(run=run, partition=partition)
        self._attempts[id(counters)] = counters
        try:
            with deadline.until(lambda: self.is_stopped(run)):
                yield counters
        finally:
            del self._attempts[id(counters)]

    @contextmanager
    def sharing(self, task: str, handover: Handover) -> Iterator[None]:
        """Inside, the task's attempt may be asked for rows."""
        self._handovers[task] = handover
        try:
            yield
        finally:
            del self._handovers[task]

    def handover(self, task: str) -> Handover | None:
        """That of the task's attempt, if it may be asked now."""
        return self._handovers.get(task)

    def is_stopped(self, run: str) -> bool:
        """Whether attempts of the run are to stage what they hold and return."""
        return run in self._stopped_runs or self._leaving.is_set()

    def stop_run(self, run: str) -> None:
        """From now on the run is stopped."""
        self._stopped_runs.add(run)

    def leave(self) -> None:
        """From now on every run is stopped."""
        self._leaving.set()

    def codec(self, order: WorkOrder) -> PromptCodec:
        """The job's tokenizer and templates, opened by the first task.

        Raises:
            ChangedError: this machine has another model than the driver's.
            Refused: as `open_codec`.
        """
        with self._lock:
            # Budgets of the engine decide no output, yet a living worker must heed a change of them.
            key = f"{order.job_hash} {order.job.engine.model_dump_json()}"
            if key not in self._codecs:
                self._opening.set()
                try:
                    codec = _open_codec(order)
                finally:
                    self._opening.clear()
                # A worker runs one job at a time as a rule, and tokenizers are large.
                self._codecs.clear()
                self._codecs[key] = codec
            return self._codecs[key]

    @contextmanager
    def engine(self, spec: EngineSpec) -> Iterator[EngineProcess]:
        """The worker's engine process for this specification, kept while this is open.

        Idle ones of other jobs make room for it.
        """
        with ExitStack() as held:
            with self._lock:
                engine = held.enter_context(self._engine(spec).in_use())
            yield engine

    def start_engine(self, spec: EngineSpec) -> None:
        """Has the engine for this specification load, ahead of its first use; waits for nothing but the lock."""
        with self._lock:
            engine = self._engine(spec)
        engine.start()

    def health(self, order: WorkOrder, spec: EngineSpec) -> EngineHealth:
        """That of the engine in this run."""
        key = _key(spec)
        with self._lock:
            if key not in self._health or self._health[key].run != order.run:
                folder = Folder(order.job.output.path, order.job.output.storage_options)
                self._health[key] = EngineHealth(order.run, folder, order.job.secrets())
            return self._health[key]

    def known_answers(self, run: str) -> KnownAnswers:
        """What the run's partitions know of each other's prompts; that of other runs is forgotten."""
        with self._lock:
            if run not in self._answers:
                self._answers = {run: KnownAnswers()}
            return self._answers[run]

    def answer_lengths(self, run: str) -> AnswerLengths:
        """What the run's partitions have shown of how long answers are; that of other runs is forgotten."""
        with self._lock:
            if run not in self._lengths:
                self._lengths = {run: AnswerLengths()}
            return self._lengths[run]

    def stop_engines(self) -> None:
        """Ends the engines' processes."""
        for engine in self.engines:
            engine.stop()

    def _engine(self, spec: EngineSpec) -> EngineProcess:
        """The one for this specification, new or not. Whoever calls holds the lock."""
        key = _key(spec)
        if key not in self._engines:
            for other in [k for k, engine in self._engines.items() if engine.idle]:
                self._engines.pop(other).stop()
                self._health.pop(other, None)
            self._engines[key] = EngineProcess(spec)
        return self._engines[key]


def _key(spec: EngineSpec) -> str:
    return repr(asdict(spec))


def _open_codec(order: WorkOrder) -> PromptCodec:
    model = resolve(order.job.model)
    codec = open_codec(order.job, model, order.schema)
    if model.fingerprint != order.model_fingerprint:
        raise ChangedError(
            "the model on this worker differs from the driver's",
            order.job.model.name,
            "give every machine the same model folder",
        )
    return codec


# Dask sends functions to its workers by name: what they share can only be found by name, too.
worker_state = WorkerState()
