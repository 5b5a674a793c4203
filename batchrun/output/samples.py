"""Several answers of a row: lists with one value for each sample, in the samples' order."""

from __future__ import annotations

import numpy as np
import pyarrow as pa

# Columns of the answers that have one value for a row, whatever its samples.
_OF_ROW = ("row", "prompt_tokens", "status", "error")


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
