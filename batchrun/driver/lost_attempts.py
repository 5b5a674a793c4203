"""What becomes of partitions whose attempts were lost: again, or alone on a worker. Dask stays with the driver."""

from __future__ import annotations

import logging
import random
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, replace

from batchrun.dataset.plan import Plan
from batchrun.driver.poison_rows import STRIKES, PoisonRowSearch
from batchrun.errors import (
    BatchrunError,
    EngineError,
    EngineNotLoaded,
    EngineOutOfMemory,
    TooManyFaults,
    one_line,
)
from batchrun.output.layout import Layout
from batchrun.storage import Folder
from batchrun.worker.engine_health import LOADS
from batchrun.worker.order import Task

log = logging.getLogger(__name__)

WHY = f"its engine or worker died {STRIKES} times while this row was alone in it"


@dataclass(frozen=True)
class IsolatedAttempt:
    """A suspect alone on a worker: `rows` None while the worker shows that it can load the engine, and empty when
    all that is left is to seal the part."""

    partition: int
    worker: str
    rows: tuple[int, ...] | None = None


class LostAttemptPolicy:
    """Judges lost attempts by what they left in storage: Dask's own suspicion blames every task that shared a worker
    with the guilty one."""

    def __init__(self, plan: Plan, folder: Folder, layout: Layout, proven: bool) -> None:
        # Whether an engine has ever finished a row of this output.
        self.proven = proven
        # Workers whose engine is not loaded any more, and why.
        self.given_up: dict[str, EngineError] = {}
        self._plan, self._folder, self._layout = plan, folder, layout
        self._search = PoisonRowSearch()
        # Objects seen for partitions whose attempts were lost.
        self._staged: dict[int, int] = {}

    @property
    def suspected(self) -> Collection[int]:
        """Partitions that are to be tried alone."""
        return self._search.open.keys()

    def lost(self, partition: int, error: BaseException | None, in_flight: int) -> bool:
        """An attempt was lost, to None if to a dead worker; whether the partition may go on like any other.

        One that staged something is free. Raises as `PoisonRowSearch` does.
        """
        staged = len(self._folder.list(self._layout.stage(partition)))
        reason = reason_of(error)
        engine = self.note_engine(error)
        self.proven = self.proven or (engine is not None and engine.proved)
        if staged > self._staged.get(partition, 0) and not (engine and engine.proved):
            self.progress(partition)
        elif _was_tried(engine) and self._search.lost(partition, reason, in_flight):
            log.warning("partition %d is lost again: %s; it is tried alone, at the end", partition, reason)
            return False
        self._staged[partition] = staged
        log.warning("partition %d is tried again from what is staged: %s", partition, reason)
        return True

    def able(self, workers: Iterable[str]) -> list[str]:
        """The workers whose engine is not given up."""
        return [worker for worker in workers if worker not in self.given_up]

    def check_engines(self, workers: Collection[str]) -> None:
        """Of all workers that there are now.

        Raises:
            TooManyFaults: each one's engine always fails.
            BatchrunError: none of them can load it.
        """
        if self.able(workers) or not workers:
            return
        last = self.given_up[[*workers][-1]]
        often = f"{LOADS} times in a row" + (
            f" on each of {len(workers)} workers" if len(workers) > 1 else ""
        )
        if isinstance(last, EngineNotLoaded):
            raise BatchrunError(
                f"no worker could load its engine, {often}, last with {last}",
                fix="look at the machine, its memory and the engine's message: no row is to blame",
            )
        raise TooManyFaults(
            f"the engine ended {often} without a finished row, last with {last}",
            fix="look at that error and that output; the same command tries again",
        )

    def note_engine(self, error: BaseException | None) -> EngineError | None:
        """The error, if it is an engine's; one that ends too often without a finished row is given up."""
        if not isinstance(error, EngineError):
            return None
        if error.fruitless >= LOADS and error.where not in self.given_up:
            log.warning(
                "the engine of %s ended %d times in a row without a finished row: it gets no more work in this run",
                error.where,
                LOADS,
            )
            self.given_up[error.where] = error
        return error

    def progress(self, partition: int) -> None:
        """New rows of the partition are durable."""
        self.proven = True
        self._search.progress(partition)

    def committed(self, partition: int) -> None:
        """The partition's part is there: it is no suspect any more."""
        self.progress(partition)
        self._search.open.pop(partition, None)

    def isolated_attempts(
        self, running: Collection[IsolatedAttempt], workers: Collection[str]
    ) -> Iterator[IsolatedAttempt]:
        """The next ones to begin: one partition to a worker."""
        busy = {isolated.worker for isolated in running}
        idle = [worker for worker in self.able(workers) if worker not in busy]
        # So that no suspect depends on one bad machine.
        random.shuffle(idle)
        tried = {isolated.partition for isolated in running}
        for partition, worker in zip([i for i in self.suspected if i not in tried], idle, strict=False):
            yield IsolatedAttempt(partition, worker)

    def task(self, isolated: IsolatedAttempt) -> Task:
        """What the worker of an isolated attempt is sent."""
        partition = self._plan.partitions[isolated.partition]
        poison_rows = dict.fromkeys(self._search.open[isolated.partition].poison_rows, WHY)
        return Task(
            partition, self._plan.files_of(partition), isolated.rows or None, poison_rows, self.proven
        )

    def examined(self, isolated: IsolatedAttempt, missing: list[int]) -> IsolatedAttempt:
        """The worker can load its engine, and `missing` rows are not durable: what it is to try of them."""
        return replace(isolated, rows=tuple(self._search.next_rows(isolated.partition, missing)))

    def lost_alone(self, isolated: IsolatedAttempt, error: BaseException, workers: Collection[str]) -> None:
        """The trial was lost. Raises as `PoisonRowSearch` does."""
        engine = self.note_engine(error)
        if not _was_tried(engine):
            return
        if isolated.rows is None:
            self._search.unloaded(isolated.worker, workers, one_line(error))
            return
        log.warning(
            "partition %d, %d rows alone, is lost: %s",
            isolated.partition,
            len(isolated.rows),
            one_line(error),
        )
        self._search.lost_alone(isolated.partition, isolated.rows, one_line(error))


def _was_tried(engine: EngineError | None) -> bool:
    """Whether an attempt came as far as its rows, which may be to blame; without an error of the engine it may have."""
    blameless = EngineNotLoaded | EngineOutOfMemory
    return engine is None or not (engine.refused or isinstance(engine, blameless))


def reason_of(error: BaseException | None) -> str:
    """Why an attempt was lost; None stands for its worker."""
    return "its worker was lost" if error is None else one_line(error)
