"""The engines of a worker: one per specification, and one that somebody was given is taken by nobody else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from batchrun.engine.protocol import EngineSpec, Request
from batchrun.worker.state import WorkerState

MINE = EngineSpec("batchrun.engine.instant:InstantEngine", "mine", "")
ANOTHERS = EngineSpec("batchrun.engine.instant:InstantEngine", "another's", "")


@pytest.fixture
def state() -> Iterator[WorkerState]:
    made = WorkerState()
    yield made
    made.stop_engines()


def test_an_engine_that_was_handed_out_and_streams_nothing_yet_is_not_taken_by_another_job(
    state: WorkerState,
) -> None:
    with state.engine(MINE) as mine:
        with state.engine(ANOTHERS):
            assert mine in state.engines
        assert [c.id for c in mine.generate(iter([Request(3, np.array([1, 2], np.int32), 4)])) if c] == [3]
        with state.engine(MINE) as again:
            assert again is mine


def test_an_engine_that_nobody_uses_makes_room_for_another_jobs(state: WorkerState) -> None:
    with state.engine(MINE) as mine:
        mine.load()
    with state.engine(ANOTHERS):
        assert mine not in state.engines
        assert [engine.spec for engine in state.engines] == [ANOTHERS]
