"""The engines of a worker: one per specification, and one that somebody was given is taken by nobody else."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from batchrun.engine.protocol import EngineSpec, Request
from batchrun.worker import task

MINE = EngineSpec("batchrun.engine.instant:InstantEngine", "mine", "")
ANOTHERS = EngineSpec("batchrun.engine.instant:InstantEngine", "another's", "")


@pytest.fixture(autouse=True)
def engines() -> Iterator[None]:
    yield
    for engine in task._engines.values():
        engine.stop()
    task._engines.clear()


def test_an_engine_that_was_handed_out_and_streams_nothing_yet_is_not_taken_by_another_job() -> None:
    with task._engine_for(MINE) as mine:
        with task._engine_for(ANOTHERS):
            assert mine in task._engines.values()
        assert [c.id for c in mine.generate(iter([Request(3, np.array([1, 2], np.int32), 4)])) if c] == [3]
        with task._engine_for(MINE) as again:
            assert again is mine


def test_an_engine_that_nobody_uses_makes_room_for_another_jobs() -> None:
    with task._engine_for(MINE) as mine:
        mine.load()
    with task._engine_for(ANOTHERS):
        assert mine not in task._engines.values()
        assert [engine.spec for engine in task._engines.values()] == [ANOTHERS]
