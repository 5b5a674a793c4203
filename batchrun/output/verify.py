"""Reading an output back in full."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun.dataset.rows import Places
from batchrun.errors import BatchrunError
from batchrun.job.output import SAMPLE, OutputSettings
from batchrun.output import digest, manifest, part, retry
from batchrun.output.output import Output
from batchrun.output.samples import repeated_batches
from batchrun.output.state import State
from batchrun.structured.answer_format import AnswerFormat

# Whole parts are held while they are read, so few at a time.
READERS = 4

Carried = Callable[[int], Iterable[pa.RecordBatch]]


@dataclass(frozen=True, slots=True)
class Verification:
    """What was read back, in rows of the output; it is exactly the plan's when `problems` is empty.

    `input_rows` are the input's where each of these has several, None where they are as many. `without_digest` counts
    parts of versions that recorded none: damage of their footers may go unseen.
    """

    parts: int
    rows: int
    ok: int
    failed: int
    problems: list[str] = field(default_factory=list)
    without_digest: int = 0
    input_rows: int | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing disagrees."""
        return not self.problems


def verify(
    output: Output,
    carried: Carried | None = None,
    places: Places | None = None,
    wanted: AnswerFormat | None = None,
) -> Verification:
    """Reads every row of every part and counts them against the plan and the manifest.

    With `carried`, which gives a partition's input again, every carried value is compared too, in order. The
    dataset of failed rows, where the job has one, is compared with the parts, and with `places` to the input.
    """
    found = output.scan()
    problems = [f"{key}: not a part of this plan" for key in found.foreign]
    known = manifest.job_hashes(output, retry.read(output.folder))

    def check(partition: int) -> _Counted:
        return _check_part(output, known, partition, int(found.part_bytes[partition]), carried, wanted)

    with ThreadPoolExecutor(READERS) as pool:
        counted = list(pool.map(check, range(output.layout.partitions)))
    for one in counted:
        problems += one.problems
    total = Verification(
        parts=int(found.committed.sum()),
        rows=sum(one.rows for one in counted),
        ok=sum(one.ok for one in counted),
        failed=sum(one.failed for one in counted),
        problems=problems,
        without_digest=sum(one.there and not one.digest for one in counted),
        input_rows=output.plan.rows if output.settings.rows_of_row > 1 else None,
    )
    total.problems.extend(_check_manifest(output, found, total, counted))
    if output.settings.failed is not None:
        total.problems.extend(output.failed_rows.problems([one.failed for one in counted], places))
    return total


@dataclass(slots=True)
class _Counted:
    rows: int = 0
    ok: int = 0
    failed: int = 0
    there: bool = True
    attempt: str = ""
    digest: str = ""
    problems: list[str] = field(default_factory=list)


def _check_part(
    output: Output,
    job_hashes: set[str],
    partition: int,
    size: int,
    carried: Carried | None,
    wanted: AnswerFormat | None,
) -> _Counted:
    folder, settings, key = output.folder, output.settings, output.layout.part(partition)
    counted = _Counted()
    if not size:
        counted.there = False
        counted.problems.append(f"{key}: missing")
        return counted
    try:
        summary = part.inspect(folder, key, size)
        counted.attempt, counted.digest = summary.attempt, summary.digest
        data = folder.read(key)
        if summary.digest and not digest.matches(data, summary.digest):
            counted.problems.append(f"{key}: {part.CHANGED}")
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if not _holds_answers(file.schema_arrow, settings, wanted):
            counted.problems.append(f"{key}: its last columns are not the answer's")
            return counted
        count = settings.rows_of_row
        expected = None if carried is None else _Rows(repeated_batches(carried(partition), count))
        for batch in file.iter_batches():
            _count(counted, batch, settings)
            first = counted.rows - batch.num_rows
            if count > 1 and not _numbers_samples(batch.column(settings.column(SAMPLE)), first, count):
                counted.problems.append(
                    f"{key}: rows {first} to {counted.rows - 1} are not {count} samples of each row of the input"
                )
            if expected is not None:
                counted.problems += [
                    f"{key}: {problem}" for problem in _differences(batch, expected, counted.rows)
                ]
    except (BatchrunError, FileNotFoundError, pa.ArrowException, OSError, KeyError) as error:
        counted.problems.append(f"{key}: {error}")
        return counted
    if problem := manifest.disagreement(summary, output, job_hashes, partition):
        counted.problems.append(f"{key}: {problem}")
    if (counted.rows, counted.ok, counted.failed) != (summary.rows, summary.ok, summary.failed):
        counted.problems.append(
            f"{key}: {counted.rows} rows, {counted.ok} ok, {counted.failed} failed where it says "
            f"{summary.rows}, {summary.ok}, {summary.failed}"
        )
    return counted


def _holds_answers(schema: pa.Schema, settings: OutputSettings, wanted: AnswerFormat | None) -> bool:
    """Names and types stand in the footer, which no checksum covers."""
    answers = part.part_schema(pa.schema([]), settings, wanted)
    return bool(pa.schema(list(schema)[-len(answers) :]).equals(answers))


def _count(counted: _Counted, batch: pa.RecordBatch, settings: OutputSettings) -> None:
    status = batch.column(settings.column("status"))
    counted.rows += batch.num_rows
    counted.ok += pc.sum(pc.equal(status, "ok"), min_count=0).as_py()
    counted.failed += pc.sum(pc.equal(status, "failed"), min_count=0).as_py()


def _numbers_samples(numbers: pa.Array, first: int, count: int) -> bool:
    """Whether a part's rows from `first` on have the numbers of their samples."""
    wanted = np.arange(first, first + len(numbers)) % count
    return bool(np.array_equal(numbers.to_numpy(zero_copy_only=False), wanted))


def _differences(batch: pa.RecordBatch, expected: _Rows, end: int) -> Iterator[str]:
    first = end - batch.num_rows
    input_rows = expected.take(batch.num_rows)
    if input_rows.num_rows != batch.num_rows:
        yield f"more rows than the input from row {first + input_rows.num_rows} on"
        return
    for name in input_rows.column_names:
        if not _same(pa.chunked_array([batch.column(name)]), input_rows[name]):
            yield f"column {name} differs from the input in rows {first} to {end - 1}"


def _same(a: pa.ChunkedArray, b: pa.ChunkedArray) -> bool:
    # Arrow holds NaN unequal to itself; as text it is not.
    return a.type == b.type and (a.equals(b) or repr(a.to_pylist()) == repr(b.to_pylist()))


class _Rows:
    """Batches of any size, taken again by row count."""

    def __init__(self, batches: Iterable[pa.RecordBatch]) -> None:
        self.batches = iter(batches)
        self.rest: pa.Table | None = None

    def take(self, rows: int) -> pa.Table:
        held = [] if self.rest is None else [self.rest]
        while (
            sum(table.num_rows for table in held) < rows and (batch := next(self.batches, None)) is not None
        ):
            held.append(pa.Table.from_batches([batch]))
        table = pa.concat_tables(held) if held else pa.table({})
        self.rest = table.slice(rows)
        return table.slice(0, rows)


def _check_manifest(
    output: Output, found: State, total: Verification, counted: Sequence[_Counted]
) -> Iterator[str]:
    try:
        written = manifest.read(output.folder)
    except BatchrunError as error:
        yield str(error)
        return
    if written is None:
        yield "no manifest: the run has not finished"
        return
    if (written.plan_hash, written.job_hash) != (output.layout.plan_hash, output.identity.job_hash):
        yield "the manifest is of another job or plan"
    if (written.rows, written.ok, written.failed) != (total.rows, total.ok, total.failed):
        yield f"the manifest counts {written.rows} rows, {written.ok} ok, {written.failed} failed"
    if written.unfinished is not None or found.retries != len(written.retries):
        yield "a retry has not finished: `batchrun retry` goes on with it"
    elif not written.describes(found) or [p.attempt for p in written.parts] != [c.attempt for c in counted]:
        yield "the manifest lists other parts than are there"
    else:
        # A manifest of an earlier version has none for any part.
        for entry, one in zip(written.parts, counted, strict=True):
            if entry.digest and entry.digest != one.digest:
                yield f"{entry.key}: its digest is not the manifest's"
