"""What is said to be safe after a stop: all that the store has, whoever staged it."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
from parts import answers

from batchrun.driver.dispatch import Dispatch
from batchrun.driver.prepare import prepare
from batchrun.errors import StorageError
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import Progress, silent
from jobs import load, write_job


@pytest.fixture
def stopped(tmp_path: Any, tiny_llama: Any) -> Dispatch:
    """One of three partitions of 20 rows has 5 staged by a worker that left with its receipt."""
    prepared = prepare(load(write_job(tmp_path, tiny_llama)))
    dispatch = Dispatch(prepared, dict.fromkeys(range(3), 20), threading.Event(), silent, Milestones())
    attempt = dispatch.order.attempt(prepared.plan.partitions[1])
    attempt.open()
    attempt.add(answers(1, range(5)))
    attempt.flush()
    dispatch.partitions.staged[0] = 3
    return dispatch


def wind_up(dispatch: Dispatch) -> str:
    client: Any = SimpleNamespace(
        status="running",
        run=lambda *words, **how: None,
        scheduler=SimpleNamespace(identity=lambda n_workers: {"workers": {}}),
        sync=lambda call, callback_timeout, **words: call(**words),
        cancel=lambda futures: None,
    )
    dispatch.in_flight[Mock(key="task")] = [1]
    dispatch._wind_up(client)
    return dispatch._safe()


def test_what_a_worker_staged_that_left_with_its_receipt_is_counted(stopped: Dispatch) -> None:
    assert wind_up(stopped) == "8 of 60 rows are safe: 0 in 0 of 3 parts, 8 staged"


def test_rows_staged_by_attempts_that_have_ended_are_shown_as_done(stopped: Dispatch) -> None:
    shown: list[Progress] = []
    stopped.on_progress = shown.append
    wind_up(stopped)
    assert shown[-1].rows_done == 3


def test_where_the_store_does_not_tell_in_time_no_number_is_said_to_be_all(
    stopped: Dispatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("no answer", "store")

    monkeypatch.setattr(stopped.folder, "list", fail)
    assert wind_up(stopped) == "at least 3 of 60 rows are safe: 0 in 0 of 3 parts, 3 staged"
