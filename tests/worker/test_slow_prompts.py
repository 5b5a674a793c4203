"""Prompts that take long to make, each: their run goes on, is seen to go on, and stops when it is told to."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from parts import attempt, faulty_folder, layout

from batchrun.counters import Counters
from batchrun.dataset.reader import RowBatch
from batchrun.driver import heartbeats
from batchrun.engine.protocol import Completion, Request, Sampling
from batchrun.errors import FaultCode, RowFault
from batchrun.prompt.renderer import RENDERER, Renderer
from batchrun.worker import generation
from batchrun.worker.generation import AttemptCounters, Generation
from batchrun.worker.plugin import snapshot

ROWS = 1000
QUICK = 200  # rows that come before the slow ones
SECONDS = 3.0  # for a slow one


class SlowRun:
    """The worker's own loop over one batch of rows whose prompts fail, all but the first ones slowly."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.counters = AttemptCounters(run="run", partition=0)
        # The time at each change that a heartbeat shows.
        self.signs = [0.0]
        self._shown = 0
        monkeypatch.setattr(generation, "time", SimpleNamespace(monotonic=lambda: self.now))

    def prompts(self, batch: pa.RecordBatch) -> list[RowFault]:
        self.look()
        self.now += sum(SECONDS if n >= QUICK else 0.0001 for n in batch["n"].to_pylist())
        return [RowFault(FaultCode.TEMPLATE_ERROR, "it takes too long")] * batch.num_rows

    def look(self) -> None:
        if self.counters.activity != self._shown:
            self._shown = self.counters.activity
            self.signs.append(self.now)

    def generate(
        self,
        requests: Iterator[Request | None],
        still_wanted: Callable[[], bool],
        recalls: object,
        is_first: bool,
    ) -> Iterator[Completion | None]:
        """As an engine's process takes requests, one after another."""
        for request in requests:
            assert request is None
            self.look()
            if not still_wanted():
                return
            yield None

    def run(self, still_wanted: Callable[[], bool] = lambda: True) -> None:
        place, _ = faulty_folder()
        one = attempt(place, layout(1), 0, ROWS, "a")
        assert one.open() is None
        codec: Any = SimpleNamespace(
            builder=SimpleNamespace(columns=["n"], prompts=self.prompts, is_scored=False),
            engine=SimpleNamespace(sampling=Sampling(), answers=None),
        )
        engine: Any = self

        def read(columns: Sequence[str]) -> Iterator[RowBatch]:
            rows = np.arange(ROWS)
            records = pa.RecordBatch.from_pydict({"n": rows})
            yield RowBatch(0, records, rows.astype(np.uint64), "here", 0, rows)

        Generation(read, one, codec, 4, self.counters, np.ones(ROWS, bool)).run(engine, still_wanted)
        self.look()


def test_a_batch_of_slow_prompts_shows_that_it_goes_on(monkeypatch):
    slow = SlowRun(monkeypatch)
    slow.run()
    assert slow.counters.failed == ROWS
    assert slow.now > 2000
    gaps = np.diff([*slow.signs, slow.now])
    assert gaps.max() <= generation.PROMPT_ROWS * SECONDS
    assert np.sort(gaps)[-2] <= SECONDS, "after the first slow ones, each row is a sign of life"


def test_failed_rows_of_a_batch_count_while_its_other_prompts_are_made(monkeypatch):
    slow = SlowRun(monkeypatch)
    slow.run(lambda: slow.counters.failed < QUICK + 200)
    assert QUICK + 200 <= slow.counters.failed < QUICK + 210


def test_a_single_row_that_ends_its_renderer_does_it_once(monkeypatch):
    renderer = Renderer()
    asked: list[str] = []

    def end(kind: str, *arguments: Any) -> str:
        asked.append(kind)
        return "rendering takes too much CPU time"

    monkeypatch.setattr(renderer, "_ask", end)
    (fault,) = renderer.rows(["{{ t }}"], ["t"], [("x",)])
    assert isinstance(fault, RowFault)
    assert len(asked) == 1


def test_rows_that_are_rendered_for_seconds_are_a_sign_of_life_meanwhile(monkeypatch):
    renderer = Renderer()
    endless = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
    template = "{% if n in (2, 3, 4) %}" + endless + "{% else %}{{ n }}{% endif %}"
    found = renderer.rows([template], ["n"], [(n,) for n in range(6)])
    assert [isinstance(row, RowFault) for row in found] == [False, False, True, True, True, False]
    assert (found[:2], found[5]) == ([["0"], ["1"]], ["5"])
    assert renderer.answers >= 3

    def signs(answers: int) -> Any:
        monkeypatch.setattr(RENDERER, "answers", answers)
        attempts = [asdict(AttemptCounters(run="run", partition=0))]
        mine = {**snapshot(SimpleNamespace()), "tasks": attempts}
        worker = {"metrics": {"batchrun": mine}, "host": "here", "nthreads": 1}
        return heartbeats.read({"worker": worker}, "run", Counters(), {0: 6}).activity[0][2]

    assert signs(1) != signs(2)
    assert signs(2) == signs(2)
