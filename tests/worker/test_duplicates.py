"""Rows with the same prompt: generated once, copied to each, whatever becomes of the row that was generated."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import attempt, faulty_folder, layout

from batchrun.dataset.reader import RowBatch
from batchrun.engine.protocol import Completion, Request, Sampling
from batchrun.errors import EngineDied, FaultCode, RowFault
from batchrun.output.attempt import Attempt
from batchrun.prompt.tokens import Prompt
from batchrun.worker import duplicates
from batchrun.worker.duplicates import Duplicates, KnownAnswers
from batchrun.worker.generation import AttemptCounters, Generation
from jobs import load, write_job

GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0)


def request(row: int, *tokens: int, **more: Any) -> Request:
    return Request(row, np.array(tokens, np.int32), 4, row_seed=row, **more)


def answer(one: Request, **more: Any) -> Completion:
    return Completion(one.id, one.token_ids * 2, "stop", **more)


class Partition:
    """One partition's attempt and generation, with the prompts of its rows."""

    def __init__(self, prompts: Sequence[int], known: KnownAnswers, sampling: Sampling = GREEDY) -> None:
        self.prompts = prompts
        self.attempt: Attempt = attempt(faulty_folder()[0], layout(1), 0, len(prompts), "a")
        assert self.attempt.open() is None
        self.counters = AttemptCounters(run="run", partition=0)
        texts: Any = SimpleNamespace(
            builder=SimpleNamespace(columns=["text"], prompts=self._prompts, is_scored=False),
            detokenizer=SimpleNamespace(
                decode=lambda found, stops: [str(ids[0]) if len(ids) else "" for ids in found]
            ),
            reasoning=None,
            answers=None,
            engine=SimpleNamespace(sampling=sampling, answers=None),
        )
        self.generation = Generation(
            self._read, self.attempt, texts, 4, self.counters, np.ones(len(prompts), bool),
            duplicates=Duplicates(known, sampling, is_merging_samples=False),
        )  # fmt: skip

    def _prompts(self, batch: pa.RecordBatch) -> list[Prompt]:
        return [Prompt(np.array([n, 5], np.int32), False) for n in batch["text"].to_pylist()]

    def _read(self, columns: Sequence[str]) -> Iterator[RowBatch]:
        rows = np.arange(len(self.prompts))
        records = pa.RecordBatch.from_pydict({"text": list(self.prompts)})
        yield RowBatch(0, records, rows.astype(np.uint64), "here", 0, rows)

    def run(self, engine: Any) -> None:
        self.generation.run(engine, lambda: True)

    def check(self) -> None:
        """Every row has the answer of its own prompt."""
        assert self.attempt.covered
        table = self.attempt._in_order()
        assert table["answer"].to_pylist() == [str(2 * n) for n in self.prompts]
        assert table["prompt_tokens"].to_pylist() == [2] * len(self.prompts)


class Engine:
    """Answers each request, perhaps first with `reason` or a fault."""

    pid = 1

    def __init__(self, reason: str = "", fault: RowFault | None = None, dies: int | None = None) -> None:
        self.reason, self.fault, self.dies, self.asked = reason, fault, dies, 0

    def generate(self, requests: Iterator[Request | None], *_: object) -> Iterator[Completion | None]:
        for one in requests:
            if one is None:
                yield None
                continue
            if self.asked == self.dies:
                raise EngineDied("killed")
            self.asked += 1
            done = answer(one)
            if self.fault is not None:
                done = Completion(one.id, np.empty(0, np.int32), "error", self.fault)
            yield replace(done, finish_reason=self.reason) if self.reason else done

    def renew(self, pid: int) -> None:
        self.fault = None


def test_rows_with_the_same_prompt_and_other_adapters_are_generated_each() -> None:
    known = KnownAnswers()
    first, second = (Duplicates(known, GREEDY, is_merging_samples=True) for _ in range(2))
    assert [first.admit(request(row, 1, 2, adapter=row % 3)) for row in range(6)] == [True] * 3 + [False] * 3
    first.ended(answer(request(1, 1, 2, adapter=1)))
    assert [copy.id for copy in first.take()] == [4]
    # Nor are those of another partition taken for them.
    assert not second.admit(request(7, 1, 2, adapter=1))
    assert [copy.id for copy in second.take()] == [7]
    assert second.admit(request(8, 1, 2, adapter=4))


def test_of_rows_with_the_same_prompt_one_is_generated_and_each_has_its_own_place() -> None:
    one, engine = Partition([3, 4, 3, 3, 7, 4], KnownAnswers()), Engine()
    one.run(engine)
    one.check()
    counts = one.counters
    assert (engine.asked, counts.requests, counts.sent_tokens) == (3, 3, 6)
    assert (counts.rows, counts.copied, counts.pulled, counts.finish_reasons) == (6, 3, 6, {"stop": 6})
    assert (counts.prompt_tokens, counts.output_tokens, counts.copied_tokens) == (6, 6, 12)
    assert one.generation.answered == 3


def test_a_row_whose_prompt_another_partition_had_gets_that_answer() -> None:
    known = KnownAnswers()
    Partition([3, 4], known).run(Engine())
    one, engine = Partition([4, 8, 3], known), Engine()
    one.run(engine)
    one.check()
    assert engine.asked == 1
    assert one.counters.copied == 2
    assert one.generation.answered == 1, "copies say nothing of the engine"


@pytest.mark.parametrize("end", ["answers", "dies", "fault"])
def test_a_row_whose_prompt_another_partition_is_at_waits_and_is_generated_if_nothing_comes_of_it(
    end: str,
) -> None:
    known = KnownAnswers()
    owner = Duplicates(known, GREEDY, is_merging_samples=False)
    theirs = request(0, 3, 5)
    assert owner.admit(theirs)

    class Waiting(Engine):
        """While its own partition waits, the other one comes to its end."""

        def generate(self, requests: Iterator[Request | None], *_: object) -> Iterator[Completion | None]:
            for done in super().generate(requests):
                if done is None and end == "answers":
                    owner.ended(answer(theirs))
                elif done is None and end == "fault":
                    owner.ended(answer(theirs, fault=RowFault(FaultCode.OUT_OF_MEMORY, "no room")))
                elif done is None:
                    owner.release()
                yield done

    one, engine = Partition([3, 9, 3], known), Waiting()
    one.run(engine)
    one.check()
    assert engine.asked == (1 if end == "answers" else 2)


def test_a_fault_of_the_model_is_that_of_each_row_and_no_other_partitions() -> None:
    known = KnownAnswers()
    one = Partition([3, 3, 3], known)
    one.run(Engine(fault=RowFault(FaultCode.OUT_OF_MEMORY, "no room")))
    assert one.attempt.covered
    assert one.counters.errors == {"OUT_OF_MEMORY": 3}
    other = Partition([3], known)
    other.run(Engine())
    other.check()


def test_a_row_that_is_tried_again_has_its_copies_wait_but_not_other_partitions() -> None:
    """Their rows in the old engine would be what the new one waits for."""
    known, claimed = KnownAnswers(), []
    other = Duplicates(known, GREEDY, is_merging_samples=False)

    class Renewed(Engine):
        def generate(self, requests: Iterator[Request | None], *_: object) -> Iterator[Completion | None]:
            for done in super().generate(requests):
                if not claimed:
                    assert not other.admit(request(50, 3, 5))
                yield done

        def renew(self, pid: int) -> None:
            super().renew(pid)
            claimed.extend(other.left_to_us())

    one = Partition([3, 3], known)
    one.run(Renewed(fault=RowFault(FaultCode.BAD_LOGITS, "not a number")))
    one.check()
    assert [row.id for row in claimed] == [50]
    assert one.counters.copied == 1


def test_an_engine_that_dies_leaves_copies_of_what_was_answered_and_the_rest_to_others() -> None:
    known = KnownAnswers()
    one = Partition([3, 4, 3, 5], known)
    with pytest.raises(EngineDied):
        one.run(Engine(dies=1))
    assert one.attempt.missing.tolist() == [1, 3] or one.attempt.missing.tolist() == [1, 2, 3]
    other, engine = Partition([4, 5, 3], known), Engine()
    other.run(engine)
    other.check()
    assert engine.asked == 2


def test_a_row_that_was_stopped_is_begun_and_its_copies_are_missing() -> None:
    one = Partition([3, 3], KnownAnswers())
    one.run(Engine(reason="cancelled"))
    assert [*one.generation.begun] == [0]
    assert one.attempt.missing.tolist() == [0, 1]


def test_what_decides_the_answer_keeps_rows_apart() -> None:
    same = Duplicates(KnownAnswers(), GREEDY, is_merging_samples=False)
    first = request(0, 3, 5)
    assert same.admit(first)
    assert not same.admit(request(1, 3, 5, generated=np.array([1], np.int32), stream=4))
    assert same.admit(replace(request(2, 3, 5), max_new_tokens=5))
    assert same.admit(request(3, 3, 5, 5))


def test_sampled_rows_are_merged_on_request_or_where_their_seeds_are_the_same() -> None:
    apart = Duplicates(KnownAnswers(), SAMPLED, is_merging_samples=False)
    assert [apart.admit(request(row, 3)) for row in (0, 1)] == [True, True]
    assert not apart.admit(replace(request(0, 3), id=2))
    merged = Duplicates(KnownAnswers(), SAMPLED, is_merging_samples=True)
    assert [merged.admit(request(row, 3)) for row in (0, 1)] == [True, False]


def test_what_a_worker_remembers_is_bounded_and_the_oldest_goes_first() -> None:
    known, owner = KnownAnswers(most_bytes=10 * duplicates.ANSWER_BYTES), object()
    for number in range(50):
        key = str(number).encode()
        assert known.claim(key, owner)
        known.tell(key, Completion(number, np.zeros(10, np.int32), "stop"))
        known.find(b"0")
    left = [number for number in range(50) if known.find(str(number).encode())]
    assert left == [0, *range(43, 50)] or left == [0, *range(42, 50)]
    assert known._bytes <= 10 * duplicates.ANSWER_BYTES


@settings(max_examples=100)
@given(seed=st.integers(0, 10**9))
def test_under_any_schedule_each_row_gets_the_answer_of_its_prompt_once(seed: int) -> None:
    """Partitions take turns; some let go of what they claimed, as if they were stopped, and their rows come again."""
    rng = random.Random(seed)
    known = KnownAnswers(most_bytes=rng.choice([0, 3 * duplicates.ANSWER_BYTES, 1 << 20]))
    rows = [[rng.randrange(6) for _ in range(rng.randrange(1, 12))] for _ in range(3)]
    got: list[dict[int, int]] = [{} for _ in rows]

    def begin(number: int) -> tuple[Duplicates, list[int], list[Request]]:
        missing = [row for row in range(len(rows[number])) if row not in got[number]]
        return Duplicates(known, GREEDY, is_merging_samples=False), missing, []

    def take(number: int) -> None:
        for done in running[number][0].take():
            assert done.id not in got[number], "a row has its answer twice"
            got[number][done.id] = int(done.token_ids[0])

    running = [begin(number) for number in range(len(rows))]
    while any(len(got[number]) < len(rows[number]) for number in range(len(rows))):
        number = rng.randrange(len(rows))
        one, missing, sent = running[number]
        if missing and rng.random() < 0.5:
            new = request(missing[0], rows[number][missing.pop(0)])
            sent += [new] if one.admit(new) else []
        elif sent and rng.random() < 0.7:
            done = answer(sent.pop(rng.randrange(len(sent))))
            assert done.id not in got[number]
            got[number][done.id] = int(done.token_ids[0])
            one.ended(done)
        elif rng.random() < 0.1:
            take(number)
            one.release()
            running[number] = begin(number)
        else:
            sent += one.left_to_us()
        if rng.random() < 0.5:
            take(number)
    for number, prompts in enumerate(rows):
        assert got[number] == {row: 2 * token for row, token in enumerate(prompts)}


def test_it_decides_the_outputs_only_where_it_merges_samples(tmp_path: Any, tiny_llama: Any) -> None:
    job = write_job(tmp_path, tiny_llama)
    plain, warm = load(job).deciding(), ("generation.temperature=1.0",)
    assert "deduplicate" not in plain["generation"]
    for value in ("true", "false"):
        assert load(job, f"generation.deduplicate={value}").deciding() == plain
    assert load(job, *warm, "generation.deduplicate=false").deciding() == load(job, *warm).deciding()
    assert load(job, *warm, "generation.deduplicate=true").deciding() != load(job, *warm).deciding()
