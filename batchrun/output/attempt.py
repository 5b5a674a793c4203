"""One try at a partition: what is staged already, what is missing, and the one put that commits it."""

from __future__ import annotations

import io
import logging
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from batchrun.counters import first_of_rows
from batchrun.errors import StorageError
from batchrun.job.output import OutputSettings
from batchrun.output import chunk, part
from batchrun.output.chunk import BadChunk, Origin
from batchrun.output.layout import PARTIAL, Layout
from batchrun.output.part import Replacement, Summary
from batchrun.output.samples import in_rows, repeated, repeated_batches
from batchrun.storage import Folder, NotFound
from batchrun.structured.answer_format import AnswerFormat

log = logging.getLogger(__name__)


# In memory offsets of text are 64 bits wide, so that a partition's answers may exceed 2 GB.
def _wide(schema: pa.Schema) -> pa.Schema:
    wide = {pa.string(): pa.large_string(), pa.list_(pa.string()): pa.list_(pa.large_string())}
    return pa.schema([field.with_type(wide.get(field.type, field.type)) for field in schema])


@dataclass(frozen=True, slots=True)
class Receipt:
    """A committed part: its key, bytes, what it says of itself, and whether this attempt's own bytes won."""

    key: str
    bytes: int
    summary: Summary
    won: bool


@dataclass(frozen=True, slots=True)
class PartialAnswer:
    """The first tokens (int32) of an answer that is not finished, behind a prompt of so many.

    `values` are what the engine gave beside them: by name, arrays of a value or a row for each token.
    """

    prompt_tokens: int
    tokens: NDArray[np.int32]
    values: dict[str, NDArray[Any]] = field(default_factory=dict)


class Attempt:
    """`open`, then `add` what `missing` names and `maybe_flush`, then `seal` once `covered`.

    `rows` are the input's. Where the output has several for each of them, one for each sample, all of a row's are
    missing or none, but in a retry; `add` then takes answers by row * samples + sample.

    An attempt that shares its partition with another one adds what is its own, flushes, and only then opens again: of
    those that do so, the last one to flush finds all rows.

    Any number of attempts at one partition may run at the same time, none of them knowing of the others: each
    flushes under keys of its own, and each would put a whole and right part. One thread uses one attempt.
    Storage errors leave an attempt as it was; the same call may be tried again.
    """

    def __init__(
        self,
        folder: Folder,
        layout: Layout,
        job_hash: str,
        partition: int,
        rows: int,
        attempt_id: str,
        settings: OutputSettings,
    ) -> None:
        self.folder = folder
        self.layout = layout
        self.partition = partition
        self.rows = rows
        self.attempt_id = attempt_id
        self.settings = settings
        self._samples, self._rows_of_row = settings.samples_of_row, settings.rows_of_row
        self._schema = chunk.answers_schema(settings.columns, self._samples)
        # For people.
        self.name_of: Callable[[int], str] = lambda row: f"row {row}"
        # What the texts become in the part.
        self.answers: AnswerFormat | None = None
        self.restored = 0
        # By row, or row * samples + sample: what earlier attempts had to let go of, the longest of each.
        self.begun: dict[int, PartialAnswer] = {}
        self._origin = Origin(layout.hash_of(partition), job_hash, partition)
        self._key = layout.part(partition)
        self._chunks_known = False
        # Taken up, or damaged.
        self._read_chunks: set[str] = set()
        self._chunks_written = 0
        self._answers: list[pa.Table] = []
        self._held = 0
        self._replaced = 0
        # Where each answer stands among all held ones; -1 where there is none yet.
        self._place: NDArray[np.int64] = np.full(rows * self._rows_of_row, -1, dtype=np.int64)
        self._pending: list[pa.Table] = []
        self._pending_rows = 0
        self._pending_bytes = 0
        self._pending_since = 0.0

    @property
    def missing(self) -> NDArray[np.int64]:
        """Offsets of the rows still to be generated, ascending."""
        return np.flatnonzero((self._place < 0).reshape(self.rows, self._rows_of_row).any(axis=1))

    @property
    def missing_samples(self) -> NDArray[np.bool_]:
        """(rows, samples) Which ones are still to be generated."""
        missing = (self._place < 0).reshape(self.rows, self._rows_of_row)
        return missing.repeat(self._samples, axis=1)

    @property
    def covered(self) -> bool:
        """Whether no row is missing any more."""
        return self._held - self._replaced == len(self._place)

    def name_of_answer(self, number: int) -> str:
        """For people, the row that an answer is of, and where that has rows of its own, the sample."""
        row, sample = divmod(number, self._rows_of_row)
        return self.name_of(row) if self._rows_of_row == 1 else f"{self.name_of(row)}, sample {sample}"

    def open(self) -> Receipt | None:
        """Takes up what other attempts have staged, if called again what they have since; a receipt if the part is
        there already.

        The listing comes before the look at the part: chunks are only deleted after the part was seen, so as
        long as there is no part, the listing was complete.
        """
        chunks = self.folder.list(self.layout.stage(self.partition))
        if receipt := self._committed():
            self.folder.delete(chunks)
            return receipt
        for key, size in sorted(chunks.items()):
            if key in self._read_chunks:
                continue
            try:
                self._take_up(key, self._read(key, size))
                self._read_chunks.add(key)
            except NotFound:
                # Swept since it was listed: another attempt has just committed.
                if receipt := self._committed():
                    return receipt
            except BadChunk as error:
                self._read_chunks.add(key)
                log.warning("%s is skipped: %s", key, error)
        self._chunks_known = self._chunks_known or bool(chunks)
        return None

    def add(self, answers: pa.Table | pa.RecordBatch) -> None:
        """Takes finished answers, schema `chunk.answers_schema`, in any order, each of them missing until now.

        Raises:
            ValueError: one outside the partition, or one that is there already.
        """
        table = pa.Table.from_batches([answers]) if isinstance(answers, pa.RecordBatch) else answers
        table = chunk.conform(table, self._schema, self._samples)
        if table.num_rows == 0:
            return
        try:
            chunk.check_rows(table, len(self._place))
        except BadChunk as error:
            raise ValueError(str(error)) from error
        if (self._place[table["row"].to_numpy()] >= 0).any():
            raise ValueError("rows that are there already")
        self._hold(table)
        if not self._pending:
            self._pending_rows, self._pending_bytes, self._pending_since = 0, 0, time.monotonic()
        self._pending.append(table)
        self._pending_rows += table.num_rows
        self._pending_bytes += table.nbytes

    def add_failed(self, rows: pa.Table) -> None:
        """Takes rows of the input, schema ANSWERS, that have nothing of any sample, in the place of what they miss."""
        answers = self._of_input(rows)
        self.add(answers.filter(pa.array(self._place[answers["row"].to_numpy()] < 0)))

    def overwrite(self, rows: pa.Table) -> None:
        """Takes such rows in the place of the answers that are there already."""
        answers = self._of_input(rows)
        self._hold(chunk.conform(answers, self._schema, self._samples))
        self._replaced += answers.num_rows

    def maybe_flush(self) -> bool:
        """Flushes when a limit of rows, bytes or seconds is reached; not when all that is left is to seal."""
        if self.covered or not self._pending:
            return False
        limits = self.settings
        due = (
            self._pending_rows >= limits.flush_rows
            or self._pending_bytes >= limits.flush_bytes
            or time.monotonic() - self._pending_since >= limits.flush_seconds
        )
        return due and self.flush()

    def flush(self) -> bool:
        """Stages all rows not staged yet as one chunk under a new key; whether there were any. One put."""
        if not self._pending:
            return False
        table = pa.concat_tables(self._pending)
        first_row = int(table["row"].to_numpy().min())
        # Counted before the put: a put that fails may still have happened, and no key is written twice.
        self._chunks_written += 1
        key = self.layout.chunk(self.partition, first_row, self.attempt_id, self._chunks_written)
        self.folder.put(key, chunk.encode(table, self._origin, self.attempt_id))
        self._read_chunks.add(key)
        self._pending = []
        return True

    def keep(self, begun: Mapping[int, PartialAnswer]) -> None:
        """Stages the tokens of rows that are not finished, as one chunk of its own kind under a new key. One put.

        No row's answer depends on it: without it a later attempt generates these tokens again, to the same end.
        """
        if not begun:
            return
        table = pa.table(
            {
                "row": list(begun),
                "prompt_tokens": [one.prompt_tokens for one in begun.values()],
                "tokens": pa.array([one.tokens for one in begun.values()], pa.list_(pa.int32())),
                "values": [_packed(one.values) for one in begun.values()],
            },
            schema=chunk.PARTIALS,
        )
        self._chunks_written += 1
        key = self.layout.partial(self.partition, min(begun), self.attempt_id, self._chunks_written)
        self.folder.put(key, chunk.encode(table, self._origin, self.attempt_id))

    def seal(self, carried: Iterable[pa.RecordBatch], schema: pa.Schema) -> Receipt:
        """Builds the whole part beside `carried` (the partition's input, in order), puts it and sweeps.

        Two requests, and two more to sweep where anything was staged.

        Raises:
            ValueError: rows are still missing.
            ChangedError: `carried` is not as long as the plan says.
            OutputError: a part is there already and it is damaged.
        """
        if not self.covered:
            raise ValueError(f"{len(self.missing)} of {self.rows} rows are missing")
        answers = self._in_order()
        mine = self._summarize(answers)
        with tempfile.TemporaryDirectory(prefix="batchrun-") as scratch:
            path = Path(scratch) / "part.parquet"
            try:
                beside = repeated_batches(carried, self._rows_of_row)
                mine = part.build(path, beside, schema, answers, self.settings, mine, self.answers)
            except OSError as error:
                raise StorageError(
                    f"the part could not be built ({error})", scratch, "free space there"
                ) from error
            size = path.stat().st_size
            created = self._publish(path)
        seen = self.folder.size(self._key)
        if seen is None:
            if created:
                # Written, yet not visible: never sweep on a promise. Later runs will.
                return Receipt(self._key, size, mine, won=True)
            raise StorageError(
                "the part is there and cannot be seen", self._key, "run again to go on from here"
            )
        # On "exists" it may still be ours: the store did it and the acknowledgement was lost.
        summary = mine if created and seen == size else self._inspect(seen)
        if self._chunks_known or self._chunks_written:
            self.folder.delete(self.folder.list(self.layout.stage(self.partition)))
        return Receipt(self._key, seen, summary, won=summary.attempt == self.attempt_id)

    def _committed(self) -> Receipt | None:
        size = self.folder.size(self._key)
        if size is None:
            return None
        summary = self._inspect(size)
        return Receipt(self._key, size, summary, won=summary.attempt == self.attempt_id)

    def _inspect(self, size: int) -> Summary:
        summary = part.inspect(self.folder, self._key, size)
        expected = (self._origin.plan_hash, self.partition, len(self._place))
        if (summary.plan_hash, summary.partition, summary.rows) != expected or self._is_foreign(summary):
            raise part.damaged(self.folder, self._key, "a part of another job, plan or partition")
        return summary

    def _is_foreign(self, summary: Summary) -> bool:
        """Whether the part is another job's. A retry may have replaced it with a changed one: the manifest tells."""
        return summary.job_hash != self._origin.job_hash and not summary.retries

    def _summarize(self, answers: pa.Table) -> Summary:
        origin = self._origin
        return part.summarize(
            answers,
            self.attempt_id,
            origin.plan_hash,
            origin.job_hash,
            self.partition,
            self._replacements(answers),
            name_of=self.name_of_answer,
            rows_of_row=self._rows_of_row,
        )

    def _replacements(self, answers: pa.Table) -> Sequence[Replacement]:
        """Those that made the part what it is: none but of a retry's."""
        return ()

    def _publish(self, path: Path) -> bool:
        """Puts the whole part; whether this call is known to have written it."""
        return self.folder.put_if_absent(self._key, path)

    def _read(self, key: str, size: int) -> bytes:
        return self.folder.read(key, 0, size) if size else b""

    def _take_up(self, key: str, data: bytes) -> None:
        if not key.endswith(PARTIAL):
            self._restore(chunk.decode(data, self._origin, len(self._place), self._schema))
            return
        table = chunk.decode_partial(data, self._origin, len(self._place) * self._samples)
        tokens = table["tokens"].combine_chunks()
        columns = (table[name].to_pylist() for name in ("row", "prompt_tokens", "values"))
        for i, (row, prompt, values) in enumerate(zip(*columns, strict=True)):
            one = PartialAnswer(prompt, tokens[i].values.to_numpy(), _unpacked(values))
            if row not in self.begun or len(one.tokens) > len(self.begun[row].tokens):
                self.begun[row] = one

    def _restore(self, table: pa.Table) -> None:
        new = self._place[table["row"].to_numpy()] < 0
        table = table.filter(pa.array(new))
        self._hold(table)
        self.restored += first_of_rows(table, self._rows_of_row).num_rows

    def _of_input(self, rows: pa.Table) -> pa.Table:
        """Rows of the input that have nothing of any sample, as answers."""
        return repeated(in_rows(rows, self._rows_of_row), self._samples)

    def _hold(self, table: pa.Table) -> None:
        self._place[table["row"].to_numpy()] = np.arange(self._held, self._held + table.num_rows)
        self._answers.append(table.cast(_wide(self._schema)))
        self._held += table.num_rows

    def _in_order(self) -> pa.Table:
        table = (
            pa.concat_tables([_wide(self._schema).empty_table(), *self._answers])
            .combine_chunks()
            .take(self._place)
        )
        if not np.array_equal(table["row"].to_numpy(), np.arange(len(self._place))):
            raise AssertionError("rows out of order")
        return table


def _packed(values: Mapping[str, NDArray[Any]]) -> bytes | None:
    if not values:
        return None
    packed = io.BytesIO()
    np.savez(packed, allow_pickle=False, **values)
    return packed.getvalue()


def _unpacked(packed: bytes | None) -> dict[str, NDArray[Any]]:
    if packed is None:
        return {}
    with np.load(io.BytesIO(packed), allow_pickle=False) as values:
        return dict(values)
