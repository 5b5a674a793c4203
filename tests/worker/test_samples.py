"""A worker's loop over rows with several samples: stopped, gone on with, some of them bad."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from parts import attempt, faulty_folder, layout
from tiny_models import model_folder

from batchrun.dataset.reader import RowBatch
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import NO_TOKENS, Completion, EngineSpec, Request, Sampling
from batchrun.errors import FaultCode, RowFault
from batchrun.job.generation import RowSettings
from batchrun.output.attempt import Attempt
from batchrun.output.layout import PARTIAL
from batchrun.prompt.tokens import Prompt
from batchrun.worker.generation import AttemptCounters, Generation

ROWS, SAMPLES, NEW = 7, 3, 20
SAMPLING = Sampling(temperature=1.0, seed=4)


class Engine:
    """In this process; `stops` after so many answers, with whatever the others are by then. Counts tokens."""

    pid = 1

    def __init__(
        self, kind: str, stops: int = 10**9, bad: dict[int, FaultCode] | None = None, **options: int
    ):
        folder = str(model_folder("llama"))
        spec = EngineSpec(
            kind, folder, folder, sampling=SAMPLING, max_context=128, stop_token_ids=(2, 9, 40, 77)
        )
        kinds = {"padded": PaddedEngine, "paged": PagedEngine}
        options = {**({"cache_tokens": 2048} if kind == "paged" else {}), **options}
        self.engine = kinds[kind].load(replace(spec, options=options))
        self.stops, self.bad, self.answers, self.prompts, self.renewed = stops, bad or {}, 0, [], 0

    def generate(
        self, requests: Iterator[Request | None], wanted: Callable[[], bool], recalls: object, is_first: bool
    ) -> Iterator[Completion | None]:
        taken = [request for request in requests if request is not None]
        self.prompts += [request.id for request in taken]
        for completion in self.engine.generate(iter(taken)):
            if completion.finish_reason != "cancelled":
                self.answers += 1
                if code := self.bad.pop(completion.id, None):
                    completion = Completion(completion.id, NO_TOKENS, "error", RowFault(code, "told to"))
            yield completion
            if self.answers >= self.stops:
                for request in taken:
                    request.cancelled = True

    def renew(self, pid: int) -> None:
        self.renewed += 1


def run(one: Attempt, engine: Engine, own: RowSettings | None = None) -> Generation:
    rng = np.random.default_rng(3)
    prompts = [Prompt(rng.integers(3, 200, 5 + i).astype(np.int32), False, own) for i in range(ROWS)]
    codec: Any = SimpleNamespace(
        builder=SimpleNamespace(
            columns=["n"],
            prompts=lambda batch: [prompts[i] for i in batch["n"].to_pylist()],
            is_scored=False,
        ),
        detokenizer=SimpleNamespace(decode=lambda found, stops: [" ".join(map(str, ids)) for ids in found]),
        reasoning=None,
        answers=None,
        engine=SimpleNamespace(sampling=SAMPLING, answers=None),
    )

    def read(columns: Sequence[str]) -> Iterator[RowBatch]:
        rows = np.arange(ROWS)
        records = pa.RecordBatch.from_pydict({"n": rows})
        yield RowBatch(0, records, (rows * 7919).astype(np.uint64), "here", 0, rows)

    wanted = np.zeros(ROWS, bool)
    wanted[one.missing] = True
    counters = AttemptCounters(run="run", partition=0)
    made = Generation(read, one, codec, NEW, counters, wanted, samples=SAMPLES)
    still = lambda: engine.answers < engine.stops  # noqa: E731
    made.run(engine, still)  # type: ignore[arg-type]
    made.counters = counters  # type: ignore[attr-defined]
    return made


def table(one: Attempt) -> list[dict[str, Any]]:
    return one._in_order().to_pylist()


@pytest.fixture(scope="module")
def whole() -> list[dict[str, Any]]:
    one = attempt(faulty_folder()[0], layout(1), 0, ROWS, "a", samples=SAMPLES)
    one.open()
    run(one, Engine("padded"))
    return table(one)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("padded", {"batch_tokens": 60}), ("paged", {"decode_steps": 1}), ("paged", {"decode_steps": 16, "max_rows": 4})],
)  # fmt: skip
def test_a_stop_keeps_whole_rows_and_the_samples_of_others_and_the_next_attempt_ends_them_alike(
    whole, kind, options, monkeypatch
):
    import batchrun.engine.padded.steps
    import batchrun.engine.paged.engine

    monkeypatch.setattr(batchrun.engine.padded.steps, "CANCEL_SECONDS", 0.0)
    monkeypatch.setattr(batchrun.engine.paged.engine, "CANCEL_SECONDS", 0.0)
    place, store = faulty_folder()
    one = attempt(place, layout(1), 0, ROWS, "a", samples=SAMPLES)
    one.open()
    stopped = run(one, Engine(kind, stops=7, **options))
    one.flush()
    one.keep(stopped.begun)
    left = one.missing
    assert 0 < len(left) < ROWS or kind == "paged"
    assert any(key.endswith(PARTIAL) for key in store.objects)
    assert {number // SAMPLES for number in stopped.begun} <= {*left.tolist()}

    two = attempt(place, layout(1), 0, ROWS, "b", samples=SAMPLES)
    two.open()
    assert two.missing.tolist() == left.tolist()
    engine = Engine(kind, **options)
    run(two, engine)
    assert {number // SAMPLES for number in engine.prompts} == {*left.tolist()}, "a chunk holds whole rows"
    assert len(engine.prompts) == SAMPLES * len(left)
    assert table(two) == whole


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_samples_in_rows_of_their_own_are_those_of_lists_also_after_a_stop(whole, kind, monkeypatch):
    import batchrun.engine.padded.steps
    import batchrun.engine.paged.engine

    monkeypatch.setattr(batchrun.engine.padded.steps, "CANCEL_SECONDS", 0.0)
    monkeypatch.setattr(batchrun.engine.paged.engine, "CANCEL_SECONDS", 0.0)
    place, _ = faulty_folder()
    one = attempt(place, layout(1), 0, ROWS, "a", each=SAMPLES)
    one.open()
    stopped = run(one, Engine(kind, stops=7, batch_tokens=60) if kind == "padded" else Engine(kind, stops=7))
    one.flush()
    one.keep(stopped.begun)
    two = attempt(place, layout(1), 0, ROWS, "b", each=SAMPLES)
    two.open()
    assert two.missing.tolist() == one.missing.tolist()
    assert two.restored == ROWS - len(one.missing)
    assert two.begun.keys() == stopped.begun.keys()
    counters = run(two, engine := Engine(kind)).counters
    assert {number // SAMPLES for number in engine.prompts} == {*one.missing.tolist()}
    assert (counters.rows, counters.requests) == (len(one.missing),) * 2
    assert counters.more_samples == (SAMPLES - 1) * len(one.missing)
    found = table(two)
    assert [row["row"] for row in found] == [*range(ROWS * SAMPLES)]
    for name in ("answer", "finish_reason", "output_tokens"):
        assert [row[name] for row in found] == [value for row in whole for value in row[name]]
    assert [row["prompt_tokens"] for row in found] == [
        row["prompt_tokens"] for row in whole for _ in range(SAMPLES)
    ]


def test_a_bad_sample_in_rows_of_their_own_fails_alone_and_its_row_is_counted_as_failed(whole):
    one = attempt(faulty_folder()[0], layout(1), 0, ROWS, "a", each=SAMPLES)
    one.open()
    made = run(one, Engine("padded", bad={4: FaultCode.BAD_LOGITS, 9: FaultCode.OUT_OF_MEMORY}))
    found = table(one)
    assert [i for i, row in enumerate(found) if row["status"] == "failed"] == [9]
    assert (found[9]["error"], found[9]["answer"]) == ("OUT_OF_MEMORY: told to", None)
    assert found[10]["answer"] == whole[3]["answer"][1]
    assert found[4]["answer"] == whole[1]["answer"][1], "healed"
    counters = made.counters
    assert (counters.rows, counters.failed, counters.errors) == (ROWS, 1, {"OUT_OF_MEMORY": 1})
    assert counters.examples == ("row 3, sample 0: OUT_OF_MEMORY: told to",)
    assert counters.prompt_tokens == sum(row["prompt_tokens"] for row in whole)


def test_samples_reach_the_engine_together_and_the_row_is_counted_once(whole):
    one = attempt(faulty_folder()[0], layout(1), 0, ROWS, "a", samples=SAMPLES)
    one.open()
    engine = Engine("paged")
    counters = run(one, engine).counters
    assert engine.prompts == list(range(ROWS * SAMPLES))
    assert table(one) == whole
    assert (counters.rows, counters.requests, counters.more_samples) == (ROWS, ROWS, ROWS * (SAMPLES - 1))
    assert counters.output_tokens == sum(sum(row["output_tokens"]) for row in whole)
    assert sum(counters.finish_reasons.values()) == ROWS * SAMPLES


def test_a_row_with_a_bad_sample_is_tried_again_as_a_whole_and_fails_alone(whole):
    one = attempt(faulty_folder()[0], layout(1), 0, ROWS, "a", samples=SAMPLES)
    one.open()
    engine = Engine("padded", bad={4: FaultCode.BAD_LOGITS, 9: FaultCode.OUT_OF_MEMORY})
    run(one, engine)
    assert engine.renewed == 1
    assert engine.prompts[ROWS * SAMPLES :] == [3, 4, 5]
    found = table(one)
    assert found[1] == whole[1], "healed"
    failed = found[3]
    assert (failed["status"], failed["error"]) == ("failed", "OUT_OF_MEMORY: sample 0: told to")
    assert failed["answer"] == [None, *whole[3]["answer"][1:]]
    assert failed["finish_reason"] == ["error", *whole[3]["finish_reason"][1:]]
    assert [row for i, row in enumerate(found) if i != 3] == [row for i, row in enumerate(whole) if i != 3]


def test_samples_and_settings_of_a_row_go_together(whole):
    one = attempt(faulty_folder()[0], layout(1), 0, ROWS, "a", samples=SAMPLES)
    one.open()
    run(one, Engine("padded"), RowSettings(NEW, 1.0, 1.0, SAMPLING.seed, ()))
    assert table(one) == whole
    other = attempt(faulty_folder()[0], layout(1), 0, ROWS, "a", samples=SAMPLES)
    other.open()
    run(other, Engine("padded"), RowSettings(3, 1.0, 1.0, 99, ()))
    assert all(max(row["output_tokens"]) <= 3 for row in table(other))
    assert table(other) != table(one)
