"""A store that fails in the middle of a task: what it costs, and what goes on meanwhile."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from faulty import FaultyStore
from parts import attempt, faulty_folder, layout

from batchrun.dataset.reader import RowBatch
from batchrun.engine.protocol import Completion, Request, Sampling
from batchrun.errors import EngineDied, StorageError
from batchrun.output.attempt import Attempt
from batchrun.prompt.tokens import Prompt
from batchrun.storage import folder
from batchrun.worker import generation
from batchrun.worker.generation import AttemptCounters, Generation

ROWS = 6


class Engine:
    """Answers each request with itself; `dies` after so many."""

    def __init__(self, dies: int | None = None) -> None:
        self.dies, self.answered = dies, 0

    def generate(self, requests: Iterator[Request], *_: object) -> Iterator[Completion]:
        for request in requests:
            if self.answered == self.dies:
                raise EngineDied("killed")
            self.answered += 1
            yield Completion(request.id, request.token_ids, "stop")


def generate(one: Attempt, engine: Any) -> AttemptCounters:
    """The worker's own loop over a partition of ROWS rows."""
    ids = np.arange(3, dtype=np.int32)
    records = pa.RecordBatch.from_pydict({"text": ["x"] * ROWS})
    texts: Any = SimpleNamespace(
        builder=SimpleNamespace(
            columns=["text"],
            prompts=lambda batch: [Prompt(ids, False)] * batch.num_rows,
            is_scored=False,
        ),
        detokenizer=SimpleNamespace(decode=lambda found, stops: ["abc"] * len(found)),
        reasoning=None,
        answers=None,
        engine=SimpleNamespace(sampling=Sampling(), answers=None),
    )
    counters = AttemptCounters(run="run", partition=0)

    def read(columns: Sequence[str]) -> Iterator[RowBatch]:
        rows = np.arange(ROWS)
        yield RowBatch(0, records, rows.astype(np.uint64), "here", 0, rows)

    Generation(read, one, texts, 4, counters, np.ones(ROWS, bool)).run(engine, lambda: True)
    return counters


@pytest.fixture
def staging(monkeypatch: pytest.MonkeyPatch) -> tuple[Attempt, FaultyStore]:
    """An attempt that flushes with every row."""
    monkeypatch.setattr(generation, "ANSWER_BATCH", 1)
    monkeypatch.setattr(folder, "FIRST_WAIT", 0.01)
    place, store = faulty_folder()
    one = attempt(place, layout(1), 0, ROWS, "a", flush_rows=1)
    assert one.open() is None
    return one, store


def test_patience_with_a_store_is_spent_once(
    staging: tuple[Attempt, FaultyStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, store = staging
    monkeypatch.setattr(folder, "PATIENCE", 0.3)
    store.gate = lambda operation, key: "busy" if operation == "put" else None
    with pytest.raises(StorageError):
        generate(one, Engine())
    assert (
        len({key for operation, key in store.requests if operation == "put"}) == 1
    )  # every flush has its own
    # The rows are still held: a store that is back gets them from the same attempt.
    store.gate = None
    assert one.flush()
    assert len(store.objects) == 1


def test_what_was_finished_before_the_engine_died_is_staged(staging: tuple[Attempt, FaultyStore]) -> None:
    one, _ = staging
    with pytest.raises(EngineDied):
        generate(one, Engine(dies=4))
    again = attempt(one.folder, one.layout, 0, ROWS, "b")
    again.open()
    assert again.restored == 4
    assert again.missing.tolist() == [4, 5]


def test_a_flush_that_waits_loses_no_row_and_writes_none_twice(staging: tuple[Attempt, FaultyStore]) -> None:
    one, store = staging
    store.script("put", "stage", *["busy"] * 5, "lost", "reset", "busy")
    assert generate(one, Engine()).rows == ROWS
    again = attempt(one.folder, one.layout, 0, ROWS, "b")
    again.open()
    assert again.restored == ROWS - 1  # the last one comes with the part
    assert one.covered
