"""Tiny plans for the tests of the output: partitions of numbered rows, answers that say whose they are."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

import numpy as np
import pyarrow as pa
from faulty import FaultyStore, new_store, stores

from batchrun.dataset.plan import Partition, Plan
from batchrun.job.output import OutputSettings
from batchrun.output import identity
from batchrun.output.attempt import Attempt, Receipt
from batchrun.output.chunk import ANSWERS
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.output.lease import Holder
from batchrun.output.output import Output
from batchrun.storage import Folder
from batchrun.structured.answer_format import AnswerFormat
from batchrun.structured.arrow import Kind

PLAN_HASH = "abcdef0123456789" * 4
JOB_HASH = "0123456789abcdef" * 4
SCHEMA = pa.schema([pa.field("id", pa.string()), pa.field("n", pa.int64())])

_names = itertools.count()


def unique(prefix: str = "store") -> str:
    return f"{prefix}-{next(_names)}"


def faulty_folder() -> tuple[Folder, FaultyStore]:
    """A folder in a fresh store, and the store."""
    name = unique()
    return Folder(f"faulty://{name}/out"), new_store(name)


def store_of(place: Folder) -> FaultyStore:
    return stores[place.url.split("/")[2]]


def layout(partitions: int) -> Layout:
    return Layout(PLAN_HASH, partitions)


def settings(each: int = 1, **kw: object) -> OutputSettings:
    """`each`: so many rows of the output for each of the input."""
    made = OutputSettings(**{"path": "unused", "compression": "none", **kw})
    if each == 1:
        return made
    columns = {"sample": "sample", **made.columns}
    return made.model_copy(update={"samples": "rows", "columns": columns}).of_samples(each)


def carried(partition: int, rows: int, batch_rows: int = 2) -> Iterator[pa.RecordBatch]:
    """The partition's input: ids that name partition and offset; every third number is null."""
    table = pa.table(
        {
            "id": [f"{partition}/{row}" for row in range(rows)],
            "n": pa.array([None if row % 3 == 2 else row for row in range(rows)], pa.int64()),
        },
        schema=SCHEMA,
    )
    return iter(table.to_batches(max_chunksize=batch_rows))


def answers(partition: int, rows: Iterable[int], who: str = "", failed: Sequence[int] = ()) -> pa.Table:
    """Answers to these offsets, in this order."""
    offsets = [int(row) for row in rows]
    bad = np.isin(offsets, list(failed)) if offsets else np.zeros(0, bool)
    return pa.table(
        {
            "row": offsets,
            "answer": [None if b else f"{partition}/{r} by {who}" for r, b in zip(offsets, bad, strict=True)],
            "finish_reason": ["error" if b else "stop" for b in bad],
            "prompt_tokens": [3] * len(offsets),
            "output_tokens": [0 if b else 2 for b in bad],
            "status": ["failed" if b else "ok" for b in bad],
            "error": ["PROMPT_TOO_LONG: 9: of 8" if b else None for b in bad],
        },
        schema=ANSWERS,
    )


# Columns that a job asks for beside the answer, one of them of another type in parts than in chunks.
ASKED = {"raw": "raw", "probabilities": "odds"}
FORMAT = AnswerFormat(None, Kind("string", texts=("yes", "no")), probabilities=True)


def with_asked(table: pa.Table) -> pa.Table:
    """The answers with those columns, each of which tells whose row it is of."""
    texts = table["answer"].to_pylist()
    odds = [text and [float(row), 0.5] for text, row in zip(texts, table["row"].to_pylist(), strict=True)]
    odds_column = pa.array(odds, pa.list_(pa.float64()))
    return table.append_column("raw", table["answer"]).append_column("probabilities", odds_column)


def check_asked(part: pa.Table) -> None:
    """Every row of a part has its own values in those columns, and a failed one none."""
    texts = part["answer"].to_pylist()
    assert part["raw"].to_pylist() == texts
    odds = [text and {"yes": float(row), "no": 0.5} for row, text in enumerate(texts)]
    assert part["odds"].to_pylist() == odds


def attempt(
    folder: Folder, plan: Layout, partition: int, rows: int, who: str, samples: int = 1, **kw: object
) -> Attempt:
    wanted = settings(**kw)
    wanted = wanted if samples == 1 else wanted.of_samples(samples)
    return Attempt(folder, plan, JOB_HASH, partition, rows, who, wanted)


def commit(folder: Folder, plan: Layout, partition: int, rows: int, who: str = "a", **kw: object) -> Receipt:
    """A whole attempt, two rows at a time."""
    one = attempt(folder, plan, partition, rows, who, **kw)
    receipt = one.open()
    if receipt is not None:
        return receipt
    missing = one.missing
    for start in range(0, len(missing), 2):
        one.add(answers(partition, missing[start : start + 2], who))
        one.maybe_flush()
    return one.seal(carried(partition, rows), SCHEMA)


def other_holder(**kw: object) -> Holder:
    now = time.time()
    values = {
        "driver": "d",
        "host": "far",
        "pid": 1,
        "machine": "m",
        "started": "1",
        "since": now,
        "heartbeat": now,
    }
    return Holder(**{**values, **kw})  # type: ignore[arg-type]


def output(
    folder: Folder, plan: Layout, rows: Sequence[int] = (), job_hash: str = JOB_HASH, **kw: object
) -> Output:
    """The output of these keys, its partitions of so many rows."""
    partitions = [Partition(i, (), count) for i, count in enumerate(rows)]
    pinned = Identity(plan.plan_hash, job_hash, {}, "model", "0")
    return Output(folder, settings(**kw), pinned, Plan([], SCHEMA, partitions), plan)


def pin(
    folder: Folder,
    now: Identity,
    input_changes: Callable[[], Iterable[str]] = tuple,
    retried: Callable[[], Iterable[Identity]] = tuple,
) -> bool:
    """Pins a job, or compares it with the pinned one, as a run does; whether it was the first."""
    pinned = identity.read(folder) or identity.pin(folder, now)
    identity.refuse_other(pinned, now, folder.name, input_changes, retried)
    return pinned is now
