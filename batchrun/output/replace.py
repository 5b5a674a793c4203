"""A retry's try at a part: what succeeded is kept as it is, what failed is generated again, one put replaces it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchrun.errors import OutputError
from batchrun.job.output import SAMPLE, OutputSettings
from batchrun.output import part
from batchrun.output.attempt import Attempt, Receipt
from batchrun.output.chunk import answers_schema
from batchrun.output.layout import Layout
from batchrun.output.part import Replacement, Summary
from batchrun.output.retry import Retry
from batchrun.output.samples import of_each
from batchrun.storage import Folder
from batchrun.structured.answer_format import AnswerFormat


class ReplacingAttempt(Attempt):
    """An attempt whose partition has a part already: `missing` are the failed rows that `retry` selects.

    It stages under the retry's own keys and publishes by one complete overwrite, the only time that a part's bytes
    change. The part then carries the retry's number; one that carries it (or a later one) is left alone, so that a
    killed retry goes on, a repeated one does nothing, and of two at once either leaves a whole part.
    """

    def __init__(
        self,
        folder: Folder,
        layout: Layout,
        partition: int,
        rows: int,
        attempt_id: str,
        settings: OutputSettings,
        retry: Retry,
    ) -> None:
        super().__init__(folder, layout, retry.identity.job_hash, partition, rows, attempt_id, settings)
        self.retry = retry
        # The part's input columns, which a retry keeps as they are.
        self.carried = pa.table({})
        self._old: Summary | None = None
        self._retried: NDArray[np.bool_] = np.zeros(rows, dtype=bool)

    def open(self) -> Receipt | None:
        """Takes up the rows that this retry staged and those that need none; a receipt if it is through here."""
        if receipt := super().open():
            return receipt
        data = self.folder.read(self._key)
        try:
            file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
            table = file.read()
            known = read_answers(table, self.settings, self.answers)
        except (pa.ArrowException, OSError, ValueError, KeyError) as error:
            raise part.damaged(self.folder, self._key, f"damaged ({error})") from error
        # Of these very bytes: another retry may have replaced the part since it was looked at.
        self._old = part.read_summary(file.metadata, self.folder, self._key)
        # Damage must not be written anew under a digest that fits it.
        part.check_digest(data, self._old, self.folder, self._key)
        if self._old.generation >= self.retry.number:
            return Receipt(self._key, len(data), self._old, won=False)
        own = [self.settings.column(field.name) for field in part.answer_fields(self.settings)]
        metadata = {key: value for key, value in (table.schema.metadata or {}).items() if key != b"batchrun"}
        carried = table.drop_columns(own).replace_schema_metadata(metadata)
        if (count := self.settings.rows_of_row) > 1:
            carried = carried.filter(pa.array(np.arange(table.num_rows) % count == 0))
        self.carried = carried
        self._retried = selected(known, self.retry)
        kept = ~self._retried & (self._place < 0)
        self._hold(known.filter(pa.array(kept)))
        return None

    def _committed(self) -> Receipt | None:
        receipt = super()._committed()
        if receipt is None:
            raise OutputError(
                "the part to be fixed is gone", self.folder.where(self._key), "`batchrun run` makes it again"
            )
        return receipt if receipt.summary.generation >= self.retry.number else None

    def _is_foreign(self, summary: Summary) -> bool:
        return False

    def _replacements(self, answers: pa.Table) -> Sequence[Replacement]:
        assert self._old is not None
        again = answers.filter(pa.array(self._retried))
        mine = Replacement(
            generation=self.retry.number,
            old=self._old.attempt,
            new=self.attempt_id,
            rows=again.num_rows,
            ok=pc.sum(pc.equal(again["status"], "ok"), min_count=0).as_py(),
            at=datetime.now(UTC).isoformat(timespec="seconds"),
        )
        return [*self._old.retries, mine]

    def _publish(self, path: Path) -> bool:
        if self._committed() is not None:
            return False
        self.folder.put(self._key, path)
        return True


def read_answers(table: pa.Table, settings: OutputSettings, wanted: AnswerFormat | None = None) -> pa.Table:
    """A part's answers, named as `settings` says, as `answers_schema` has them: what `wanted` made of them is text."""
    samples = settings.samples_of_row
    columns: dict[str, pa.Array | pa.ChunkedArray] = {"row": pa.array(np.arange(table.num_rows))}
    for field in part.answer_fields(settings):
        name, column = field.name, table[settings.column(field.name)]
        if name == SAMPLE:
            continue
        if wanted is not None:
            column = of_each(column, samples if name == "answer" else 1, partial(wanted.staged, name))
        columns[name] = column
    return pa.table(columns).cast(answers_schema(settings.columns, samples))


def selected(answers: pa.Table, retry: Retry) -> NDArray[np.bool_]:
    """(answers,) Whether the retry generates it again."""
    chosen = pc.equal(answers["status"], "failed")
    if retry.errors:
        codes = part.error_codes(answers["error"])
        chosen = pc.and_(chosen, pc.is_in(codes, pa.array(retry.errors, codes.type)))
    return np.asarray(chosen.to_numpy(zero_copy_only=False), np.bool_)
