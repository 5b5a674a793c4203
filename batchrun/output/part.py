"""A part: one partition's final Parquet file, its input columns and answers in input order."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun.counters import empty_answers, first_of_rows, one_by_one, value_counts
from batchrun.errors import ChangedError, OutputError, StorageError
from batchrun.job.output import SAMPLE, OutputSettings
from batchrun.output import digest
from batchrun.output.chunk import answers_schema
from batchrun.output.samples import of_each
from batchrun.storage import Folder, NotFound
from batchrun.structured.answer_format import AnswerFormat

_SAMPLE = pa.field(SAMPLE, pa.int32(), nullable=False)


def answer_fields(settings: OutputSettings) -> list[pa.Field]:
    """The answer's fields of a part, by their own names."""
    staged = answers_schema(settings.columns, settings.samples_of_row)
    number = [_SAMPLE] if settings.rows_of_row > 1 else []
    return [*number, *(field for field in staged if field.name != "row")]


# Large enough to compress and scan well, small enough that a reader with little memory takes one at a time.
ROW_GROUP_BYTES = 64 << 20

# One ranged read that holds the footer of nearly every part.
_TAIL_BYTES = 64 << 10

CHANGED = "its bytes changed since it was written (its digest does not match)"

# Characters of an example of an error; the whole message stands in the part.
_EXAMPLE = 200


@dataclass(frozen=True, slots=True)
class Replacement:
    """What the retry numbered `generation` did to a part: it put the attempt `new` in place of `old` at the time
    `at` (ISO, UTC), with `rows` generated again, `ok` of them answered now."""

    generation: int
    old: str
    new: str
    rows: int
    ok: int
    at: str


@dataclass(frozen=True, slots=True)
class Summary:
    """What a part says about itself in its footer (key-value metadata "batchrun", JSON).

    Its rows are the part's own, of which a row of the input may have several, one for each sample; a prompt's tokens
    count once for all of them. `errors` counts failed rows by code, `examples` gives the first of each;
    `finish_reasons` counts all rows, `empty` those with an answer of no text (each sample by itself; both unknown to
    parts of before version 0.3); `retries` tells how the part came to be other than the run made it. `digest` is of all
    the part's bytes, see `batchrun.output.digest`; empty in parts of versions that had none.
    """

    attempt: str
    plan_hash: str
    job_hash: str
    partition: int
    rows: int
    ok: int
    failed: int
    prompt_tokens: int
    output_tokens: int
    errors: dict[str, int]
    examples: dict[str, str] = field(default_factory=dict)
    finish_reasons: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    retries: list[Replacement] = field(default_factory=list)
    digest: str = ""

    @property
    def generation(self) -> int:
        """The number of the last retry that replaced the part, 0 where none did."""
        return self.retries[-1].generation if self.retries else 0


def part_schema(
    carried: pa.Schema, settings: OutputSettings, wanted: AnswerFormat | None = None
) -> pa.Schema:
    """Carried fields and the schema's metadata as they are, then the answer's fields, as lists or in rows of their own
    where there are several samples; `wanted` gives the answer its type."""
    fields = answer_fields(settings)
    if wanted is not None:
        fields = [wanted.typed(field) for field in fields]
    answers = [field.with_name(settings.column(field.name)) for field in fields]
    return pa.schema([*carried, *answers], metadata=carried.metadata)


def error_codes(errors: pa.ChunkedArray) -> pa.ChunkedArray:
    """What stands before the colon in each error; empty for a null."""
    errors = pc.fill_null(errors, "")
    return pc.list_element(pc.split_pattern(errors, ":", max_splits=1), 0) if len(errors) else errors


def summarize(
    answers: pa.Table,
    attempt: str,
    plan_hash: str,
    job_hash: str,
    partition: int,
    retries: Sequence[Replacement] = (),
    name_of: Callable[[int], str] = lambda row: f"row {row}",
    rows_of_row: int = 1,
) -> Summary:
    """Counts over a partition's answers in order (any string type, ANSWERS otherwise), of which a row of the input has
    so many."""
    ok = pc.sum(pc.equal(answers["status"], "ok"), min_count=0).as_py()
    failed = answers.filter(pc.equal(answers["status"], "failed"))
    codes = error_codes(failed["error"])
    counts = value_counts(codes)
    return Summary(
        attempt=attempt,
        plan_hash=plan_hash,
        job_hash=job_hash,
        partition=partition,
        rows=answers.num_rows,
        ok=ok,
        failed=answers.num_rows - ok,
        prompt_tokens=pc.sum(first_of_rows(answers, rows_of_row)["prompt_tokens"], min_count=0).as_py(),
        output_tokens=pc.sum(one_by_one(answers["output_tokens"]), min_count=0).as_py(),
        errors=counts,
        examples={code: _example(failed, pc.index(codes, code).as_py(), name_of) for code in counts},
        finish_reasons=value_counts(one_by_one(answers["finish_reason"])),
        empty=empty_answers(answers),
        retries=[*retries],
    )


def build(
    path: Path,
    carried: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    answers: pa.Table,
    settings: OutputSettings,
    summary: Summary,
    wanted: AnswerFormat | None = None,
) -> Summary:
    """Writes the part to a local file: `carried` batches of `schema` beside `answers` in the same order, these as
    `wanted` has them.

    Returns the summary with the digest of the file.

    Raises:
        ChangedError: `carried` does not hold exactly as many rows as there are answers.
    """
    target = part_schema(schema, settings, wanted)
    with pq.ParquetWriter(path, target, compression=settings.compression, write_page_checksum=True) as writer:
        beside = _beside(carried, schema, answers, settings, writer.schema, wanted)
        for group in _row_groups(beside):
            writer.write_table(group, row_group_size=max(1, group.num_rows))
        values = asdict(replace(summary, digest=digest.BLANK))
        writer.add_key_value_metadata({"batchrun": json.dumps(values, sort_keys=True)})
    written = pq.read_metadata(path).num_rows
    if written != summary.rows:
        raise OutputError(
            f"{written} rows were written for {summary.rows}", str(path), "report this as a bug"
        )
    return replace(summary, digest=digest.stamp(path))


def inspect(folder: Folder, key: str, size: int | None = None) -> Summary:
    """What the part says about itself: one ranged read, and one request more where its size is not given.

    Raises:
        FileNotFoundError: there is no such part.
        OutputError: it is no whole part of batchrun's.
        StorageError: it vanished in between.
    """
    size = folder.size(key) if size is None else size
    if size is None:
        raise NotFound(key)
    try:
        return _inspect(folder, key, size)
    except OutputError:
        # A retry may have replaced it since its size was looked up.
        now = folder.size(key)
        if now in (None, size):
            raise
    return _inspect(folder, key, now)


def _inspect(folder: Folder, key: str, size: int) -> Summary:
    try:
        metadata = _read_footer(folder, key, size)
    except NotFound as error:
        raise StorageError("it was there and is gone", folder.where(key), "run again") from error
    except (pa.ArrowException, OSError, ValueError) as error:
        raise damaged(folder, key, "not a whole part of batchrun's") from error
    return read_summary(metadata, folder, key)


def read_summary(metadata: pq.FileMetaData, folder: Folder, key: str) -> Summary:
    """What the part with this footer says about itself; `folder` and `key` are for the error's text."""
    try:
        values = json.loads(metadata.metadata[b"batchrun"])
        values["retries"] = [Replacement(**entry) for entry in values["retries"]]
        summary = Summary(**{f.name: values[f.name] for f in fields(Summary) if f.name in values})
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(folder, key, "not a whole part of batchrun's") from error
    if metadata.num_rows != summary.rows or summary.ok + summary.failed != summary.rows:
        raise damaged(folder, key, f"{metadata.num_rows} rows where its own count says {summary.rows}")
    return summary


def check_digest(data: bytes, summary: Summary, folder: Folder, key: str) -> None:
    """Raises OutputError where the bytes of a whole part are not those that were written."""
    if summary.digest and not digest.matches(data, summary.digest):
        raise damaged(folder, key, CHANGED)


def damaged(folder: Folder, key: str, what: str) -> OutputError:
    """The error for a part that is not what it should be."""
    return OutputError(what, folder.where(key), "delete this file and run again")


def _example(failed: pa.Table, place: int, name_of: Callable[[int], str]) -> str:
    error = failed["error"][place].as_py() or ""
    text = error if len(error) <= _EXAMPLE else f"{error[: _EXAMPLE - 3]}..."
    return f"{name_of(failed['row'][place].as_py())}: {text}"


def _beside(
    carried: Iterable[pa.RecordBatch],
    schema: pa.Schema,
    answers: pa.Table,
    settings: OutputSettings,
    target: pa.Schema,
    wanted: AnswerFormat | None,
) -> Iterator[pa.Table]:
    first = 0
    for batch in carried:
        these = answers.slice(first, batch.num_rows)
        if these.num_rows != batch.num_rows:
            raise _other_rows(answers.num_rows, "more")
        arrays = [batch.column(name) for name in schema.names]
        for own in answer_fields(settings):
            column = _in_part(own.name, these, settings, wanted)
            arrays.append(column.cast(target.field(settings.column(own.name)).type))
        yield pa.Table.from_arrays(arrays, schema=target)
        first += batch.num_rows
    if first != answers.num_rows:
        raise _other_rows(answers.num_rows, str(first))


def _in_part(
    name: str, answers: pa.Table, settings: OutputSettings, wanted: AnswerFormat | None
) -> pa.Array | pa.ChunkedArray:
    if name == SAMPLE:
        return pa.array(answers["row"].to_numpy() % settings.rows_of_row)
    if wanted is None:
        return answers[name]
    samples = settings.samples_of_row if name == "answer" else 1
    return of_each(answers[name], samples, partial(wanted.column, name))


def _other_rows(planned: int, found: str) -> ChangedError:
    return ChangedError(f"the input gives {found} rows where the plan has {planned}", "input", "plan again")


def _row_groups(tables: Iterator[pa.Table]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    size = 0
    for table in tables:
        waiting.append(table)
        size += table.nbytes
        if size >= ROW_GROUP_BYTES:
            yield pa.concat_tables(waiting)
            waiting, size = [], 0
    if waiting:
        yield pa.concat_tables(waiting)


def _read_footer(folder: Folder, key: str, size: int) -> pq.FileMetaData:
    start = max(0, size - _TAIL_BYTES)
    tail = folder.read(key, start, size) if size else b""
    footer = int.from_bytes(tail[-8:-4], "little") + 8
    if len(tail) < footer <= size:
        tail = folder.read(key, size - footer, size)
    return pq.read_metadata(pa.BufferReader(tail))
