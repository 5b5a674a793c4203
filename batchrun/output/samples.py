"""Several answers of a row, in the samples' order: lists with a value for each, or a row of the output for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import pyarrow as pa

from batchrun.counters import one_by_one

# Columns of the answers that have one value for a row, whatever its samples.
_OF_ROW = ("row", "prompt_tokens", "status", "error")

# Of a batch that is repeated: what Arrow's 32-bit offsets hold, with room to spare.
_REPEATED_BYTES = 256 << 20


def in_lists(schema: pa.Schema, samples: int) -> pa.Schema:
    """The schema of rows of so many samples: with more than one, all but the row's own columns are lists."""
    if samples == 1:
        return schema
    return pa.schema([f if f.name in _OF_ROW else f.with_type(pa.list_(f.type)) for f in schema])


def grouped(values: pa.Array | pa.ChunkedArray, samples: int) -> pa.Array:
    """(rows * samples,) values as (rows,) lists of `samples` values; as they are where that is 1."""
    if isinstance(values, pa.ChunkedArray):
        values = values.combine_chunks()
    if samples == 1:
        return values
    offsets = pa.array(np.arange(0, len(values) + 1, samples, dtype=np.int32))
    return pa.ListArray.from_arrays(offsets, values)


def of_each(
    column: pa.ChunkedArray, samples: int, convert: Callable[[pa.ChunkedArray], pa.Array | pa.ChunkedArray]
) -> pa.Array | pa.ChunkedArray:
    """A column of lists of samples with another value in the place of each; of one sample, without lists."""
    return convert(column) if samples == 1 else grouped(convert(one_by_one(column)), samples)


def repeated(rows: pa.Table, samples: int) -> pa.Table:
    """Rows that have nothing of any sample, with what they have in the place of each."""
    if samples == 1 or pa.types.is_list(rows["answer"].type):
        return rows
    places = np.repeat(np.arange(rows.num_rows), samples)
    return pa.table(
        {
            name: rows[name] if name in _OF_ROW else grouped(rows[name].take(places), samples)
            for name in rows.column_names
        }
    )


def in_rows(rows: pa.Table, count: int) -> pa.Table:
    """Rows of the input that have nothing of any sample as rows of the output, `count` for each."""
    if count == 1:
        return rows
    places = np.repeat(np.arange(rows.num_rows), count)
    numbers = rows["row"].to_numpy()[places] * count + np.tile(np.arange(count), rows.num_rows)
    return rows.take(places).set_column(0, rows.schema.field("row"), pa.array(numbers))


def repeated_batches(batches: Iterable[pa.RecordBatch], count: int) -> Iterator[pa.RecordBatch]:
    """Each row `count` times, one behind another."""
    for batch in batches:
        yield from [batch] if count == 1 else _repeated(batch, count)


def _repeated(batch: pa.RecordBatch, count: int) -> Iterator[pa.RecordBatch]:
    if batch.num_rows == 1:
        yield from [batch] * count
    elif batch.nbytes * count > _REPEATED_BYTES:
        half = batch.num_rows // 2
        yield from _repeated(batch.slice(0, half), count)
        yield from _repeated(batch.slice(half), count)
    else:
        yield batch.take(pa.array(np.repeat(np.arange(batch.num_rows), count)))


def merged(answers: pa.Table, samples: int) -> pa.Table:
    """A table of rows out of one of samples, whose rows have theirs one after another.

    A row fails with the first of its samples that fails; what the others have stays.
    """
    if samples == 1:
        return answers
    first = np.arange(0, answers.num_rows, samples)
    errors = [_of_samples(answers["error"][i : i + samples].to_pylist()) for i in first.tolist()]
    columns = {
        name: answers[name].take(first) if name in _OF_ROW else grouped(answers[name], samples)
        for name in answers.column_names
    }
    columns["error"] = pa.array(errors, pa.string())
    columns["status"] = pa.array(["ok" if error is None else "failed" for error in errors], pa.string())
    return pa.table(columns)


def _of_samples(errors: list[str | None]) -> str | None:
    for number, error in enumerate(errors):
        if error is not None:
            code, _, message = error.partition(": ")
            return f"{code}: sample {number}: {message}"
    return None
