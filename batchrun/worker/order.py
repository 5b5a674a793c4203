"""What goes between driver and worker: the run's order, a task of it, and the receipt for that."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from batchrun.dataset.names import RowNames
from batchrun.dataset.plan import Partition
from batchrun.dataset.reader import RowBatch
from batchrun.dataset.rows import Places, places_of, read_rows
from batchrun.dataset.source import DataFile
from batchrun.engine.protocol import EngineStats
from batchrun.job.job import Job
from batchrun.output.attempt import Attempt, Receipt
from batchrun.output.layout import Layout
from batchrun.output.replace import ReplacingAttempt
from batchrun.output.retry import Retry
from batchrun.storage import Folder
from batchrun.worker.generation import AttemptCounters


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
        """The partition's input rows in order, with these columns."""
        return read_rows(self.job, self.schema, task.partition, task.files, columns)

    def names(self, task: Task) -> RowNames:
        """The names of its rows, for messages."""
        return RowNames(task.partition, task.files, self.job.input, lambda: self.read(task, ()))

    def places(self, task: Task) -> Places:
        """Where its rows are in the input."""
        return lambda _: places_of(self.job, self.schema, task.partition, task.files)


@dataclass(frozen=True)
class Task:
    """One partition and the files that it reads, by the numbers its slices use.

    With `rows`, only these are generated. If it `is_shared`, an attempt on another worker has left them to this one,
    and whichever is done last seals the partition. `poison_rows` rows go to no engine; each has the reason that is its
    error.
    `proven` says that engines have finished rows of this output before: what kills one may then be the row that it has.
    """

    partition: Partition
    files: dict[int, DataFile]
    rows: Sequence[int] | None = None
    poison_rows: Mapping[int, str] = field(default_factory=dict)
    proven: bool = False
    is_shared: bool = False


@dataclass(frozen=True)
class TaskReceipt:
    """What a task tells the driver. `part` is None when it was told to stop before its partition was covered, or when
    another attempt, which it shared the partition with, was not done."""

    worker: str
    part: Receipt | None
    counters: AttemptCounters
    engine: EngineStats | None
    seconds: float
