"""Staged rows: a small Parquet file that proves its own wholeness."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from dataclasses import asdict, dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from batchrun.output.samples import grouped, in_lists

# One row is one answer: `row` is its offset in the partition. A failed row has no answer but an error,
# "CODE: message".
ANSWERS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("answer", pa.string()),
        pa.field("finish_reason", pa.string()),
        pa.field("prompt_tokens", pa.int32()),
        pa.field("output_tokens", pa.int32()),
        pa.field("status", pa.string(), nullable=False),
        pa.field("error", pa.string()),
    ]
)

# Columns that the job asks for, beside those. A list has a value for each token of the answer, the ending one too.
_TOKEN = pa.struct({"token_id": pa.int32(), "token": pa.string(), "logprob": pa.float32()})
ASKED = pa.schema(
    [
        pa.field("logprobs", pa.list_(pa.float32())),
        pa.field("top_logprobs", pa.list_(pa.list_(_TOKEN))),
        pa.field("mean_logprob", pa.float32()),
        pa.field("reasoning", pa.string()),
        pa.field("reasoning_tokens", pa.int32()),
        pa.field("raw", pa.string()),
        # Of the job's choices, in their order; in a part a struct with a field for each.
        pa.field("probabilities", pa.list_(pa.float64())),
        pa.field("perplexity", pa.float64()),
        pa.field("scored_tokens", pa.int32()),
    ]
)

# One row is an answer that was begun: its first tokens, behind a prompt of so many, and the tokens' values as .npz.
PARTIALS = pa.schema(
    [
        pa.field("row", pa.int64(), nullable=False),
        pa.field("prompt_tokens", pa.int32(), nullable=False),
        pa.field("tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("values", pa.binary()),
    ]
)


def answers_schema(asked: Collection[str], samples: int = 1) -> pa.Schema:
    """ANSWERS, and those of the columns ASKED that are named; as lists where rows have several `samples`."""
    schema = pa.schema([*ANSWERS, *(field for field in ASKED if field.name in asked)])
    return in_lists(schema, samples)


def conform(table: pa.Table, schema: pa.Schema, samples: int = 1) -> pa.Table:
    """The table in another schema: columns that only some jobs ask for are nulls where it lacks them."""
    for field in schema:
        if field.name in (*ASKED.names, "values") and field.name not in table.column_names:
            kind = field.type if samples == 1 else field.type.value_type
            nulls = grouped(pa.nulls(table.num_rows * samples, kind), samples)
            table = table.append_column(field.name, nulls)
    return table.select(schema.names).cast(schema)


# Parquet checks its pages but not its footer. So a digest of the whole file stands in the footer's metadata,
# taken while zeros stood in its place; the file stays plain Parquet.
_MARK = b"batchrun-sha256:"
_BLANK = b"0" * 64


class BadChunk(Exception):
    """Damaged, cut short, or of another job, plan or partition: its rows count as not generated."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Whose rows a chunk holds."""

    plan_hash: str
    job_hash: str
    partition: int


def encode(rows: pa.Table, origin: Origin, attempt_id: str) -> bytes:
    """A chunk of `rows` (schema ANSWERS or PARTIALS), as Parquet bytes."""
    sink = pa.BufferOutputStream()
    metadata = json.dumps({**asdict(origin), "attempt": attempt_id})
    with pq.ParquetWriter(
        sink, rows.schema, compression="zstd", compression_level=1, use_dictionary=False, write_statistics=False,
        store_schema=False,
    ) as writer:  # fmt: skip
        writer.write_table(rows)
        writer.add_key_value_metadata({"batchrun": metadata, "digest": (_MARK + _BLANK).decode()})
    blank: bytes = sink.getvalue().to_pybytes()
    start = blank.rindex(_MARK) + len(_MARK)
    return blank[:start] + hashlib.sha256(blank).hexdigest().encode() + blank[start + len(_BLANK) :]


def decode(data: bytes, expected: Origin, rows: int, schema: pa.Schema = ANSWERS) -> pa.Table:
    """The answers of a chunk, in `schema`; `rows` is how many its partition has.

    Raises:
        BadChunk: anything but the very bytes that were encoded for this plan, job and partition.
    """
    table = _decode(data, expected, schema)
    check_rows(table, rows)
    return table


def decode_partial(data: bytes, expected: Origin, rows: int) -> pa.Table:
    """The begun answers of a chunk, schema PARTIALS. Raises BadChunk as `decode` does."""
    table = _decode(data, expected, PARTIALS)
    _check_offsets(table, rows)
    return table


def _decode(data: bytes, expected: Origin, schema: pa.Schema) -> pa.Table:
    _check_digest(data)
    try:
        file = pq.ParquetFile(pa.BufferReader(data))
        table = conform(file.read(), schema)
        origin = json.loads((file.metadata.metadata or {})[b"batchrun"])
        foreign = {key: origin.get(key) for key in asdict(expected)} != asdict(expected)
    except (pa.ArrowException, OSError, ValueError, KeyError, AttributeError) as error:
        raise BadChunk(f"written in another format ({error})") from error
    if foreign:
        raise BadChunk("of another plan, job or partition")
    return table


def check_rows(answers: pa.Table, rows: int) -> None:
    """Every row's offset lies in the partition and appears once, and its status is known; else BadChunk."""
    _check_offsets(answers, rows)
    if not pc.all(pc.is_in(answers["status"], pa.array(["ok", "failed"])), min_count=0).as_py():
        raise BadChunk("a status other than ok or failed")


def _check_offsets(table: pa.Table, rows: int) -> None:
    offsets = table["row"].to_numpy()
    if len(offsets) and (offsets.min() < 0 or offsets.max() >= rows):
        raise BadChunk(f"rows outside the partition's {rows}")
    if len(np.unique(offsets)) != len(offsets):
        raise BadChunk("rows that appear twice")


def _check_digest(data: bytes) -> None:
    start = data.rfind(_MARK) + len(_MARK)
    end = start + len(_BLANK)
    if start < len(_MARK) or end > len(data):
        raise BadChunk("damaged or cut short")
    digest = hashlib.sha256(data[:start])
    digest.update(_BLANK)
    digest.update(data[end:])
    if digest.hexdigest().encode() != data[start:end]:
        raise BadChunk("damaged or cut short")
