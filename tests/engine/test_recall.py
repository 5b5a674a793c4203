"""Rows that an engine has not begun with can be asked back, and each is answered once whatever it is at just then."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress

import numpy as np
import pytest
import warm
from tiny_models import model_folder

from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import Completion, EngineSpec, Request
from batchrun.errors import EngineDied

NEW = 16


class Asking:
    """Asks once, for all rows in this order, as soon as an answer is there; what came back until it was answered."""

    def __init__(self, rows: Sequence[Sequence[int]], most: float, after: int = 1) -> None:
        self.rows, self.most, self.after = rows, most, after
        self.done: list[Completion] = []
        self.back: set[int] | None = None
        self.asked = 0.0
        self.seconds = 0.0

    def serve(self, recall: Callable[[Sequence[Sequence[int]], Sequence[float], float], None]) -> None:
        if self.asked and self.back is None:
            self.seconds = time.monotonic() - self.asked
            self.back = {one.id for one in self.done if one.finish_reason == "cancelled"}
        if not self.asked and len(self.done) >= self.after:
            self.asked = time.monotonic()
            recall(self.rows, [1.0] * len(self.rows), self.most)

    def run(self, engine: EngineProcess, requests: list[Request]) -> dict[int, Completion]:
        for one in engine.generate(iter(requests), recalls=self):
            if one is not None:
                self.done.append(one)
        assert len({one.id for one in self.done}) == len(self.done) == len(requests), "each once"
        return {one.id: one for one in self.done}


@pytest.fixture(scope="module", params=["padded", "paged"])
def engine(request: pytest.FixtureRequest) -> Iterator[EngineProcess]:
    folder = str(model_folder("llama"))
    options = {"batch_tokens": 120, "cache_tokens": 4096, "max_rows": 4, "decode_steps": 4}
    process = EngineProcess(EngineSpec(request.param, folder, folder, max_context=512, options=options))
    with pytest.MonkeyPatch.context() as monkeypatch:
        warm.fork_engines(monkeypatch)
        process.load()
        yield process
        process.stop()


def requests(count: int = 24) -> list[Request]:
    rng = np.random.default_rng(1)
    return [Request(i, rng.integers(3, 200, 12).astype(np.int32), NEW, row_seed=i) for i in range(count)]


def test_rows_that_wait_come_back_at_once_and_the_others_are_answered_as_ever(engine):
    whole = {one.id: one for one in engine.generate(iter(requests())) if one is not None}
    asking = Asking([[i] for i in range(24)], most=10)
    done = asking.run(engine, requests())
    assert asking.back is not None
    assert len(asking.back) == 10, "as many as were asked for"
    for number, one in done.items():
        if number in asking.back:
            assert len(one.token_ids) == 0
        else:
            assert one.finish_reason == whole[number].finish_reason
            assert one.token_ids.tolist() == whole[number].token_ids.tolist()
    assert {one.id for one in done.values() if one.finish_reason == "cancelled"} == asking.back


def test_a_row_that_was_begun_stays_and_the_engine_goes_on_afterwards(engine):
    asking = Asking([[i] for i in range(24)], most=1000)
    done = asking.run(engine, requests())
    ended = [one for one in done.values() if one.finish_reason != "cancelled"]
    assert all(len(one.token_ids) for one in ended), "no answer is cut short"
    assert asking.back
    assert len(ended) + len(asking.back) == 24
    again = {one.id: one for one in engine.generate(iter(requests())) if one is not None}
    assert len(again) == 24
    assert {one.finish_reason for one in again.values()} <= {"stop", "length"}


def test_a_row_goes_with_all_its_requests_or_not_at_all(engine):
    pairs = [[2 * i, 2 * i + 1] for i in range(12)]
    asking = Asking(pairs, most=1000)
    asking.run(engine, requests())
    assert asking.back
    for pair in pairs:
        assert len(asking.back.intersection(pair)) in (0, 2)


def test_an_engine_that_says_nothing_of_waiting_gives_back_what_it_has_not_pulled():
    engine = EngineProcess(EngineSpec("faulty_engines:SteppingEngine", "the-model", "the-tokenizer"))
    try:
        engine.load()
        asking = Asking([[i] for i in range(30)], most=1000, after=1)
        done = asking.run(engine, [Request(i, np.arange(3, 9, dtype=np.int32), 6) for i in range(30)])
    finally:
        engine.stop()
    # It has pulled 16 at once, and takes others as these end together.
    assert {one.id for one in done.values() if one.finish_reason == "length"} >= set(range(16))
    assert asking.back == set(range(30)) - {i for i, one in done.items() if one.finish_reason == "length"}


def test_who_waits_for_answers_is_woken_to_ask(monkeypatch):
    # Nothing else wakes it.
    monkeypatch.setattr("batchrun.engine.processes.process.PATIENCE_SECONDS", 60.0)
    engine = EngineProcess(EngineSpec("fake_engines:ObeyingEngine", "the-model", "the-tokenizer"))
    served: list[float] = []

    class Noting:
        def serve(self, recall: object) -> None:
            served.append(time.monotonic())

    def one_by_one() -> Iterator[Request]:
        # The engine sleeps for half a minute.
        yield Request(0, np.array([-3, 30_000], np.int32), 2)

    def take() -> None:
        with suppress(EngineDied):
            list(engine.generate(one_by_one(), recalls=Noting()))

    taking = threading.Thread(target=take)
    try:
        engine.load()
        taking.start()
        for _ in range(5):
            before = len(served)
            engine.wake()
            deadline = time.monotonic() + 20
            while len(served) == before and time.monotonic() < deadline:
                time.sleep(0.005)
            assert len(served) > before
    finally:
        engine.stop()
        taking.join()
