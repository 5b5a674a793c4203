"""What the driver makes of several attempts at one partition, however they end."""

from __future__ import annotations

import threading
from concurrent.futures import Future
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import KilledWorker

from batchrun.driver.dispatch import Dispatch
from batchrun.driver.prepare import prepare
from batchrun.driver.tail import Handover
from batchrun.errors import EngineDied
from batchrun.output.attempt import Receipt
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import silent
from batchrun.worker.generation import AttemptCounters
from batchrun.worker.order import TaskReceipt
from jobs import load, write_job

OWNER, TAKER = "tls://owner", "tls://taker"


class Task:
    """A future of Dask's that ends as a test says."""

    def __init__(self, key: str) -> None:
        self.key, self.status, self.outcome = key, "pending", None

    def result(self, timeout: float) -> Any:
        return self.outcome

    def exception(self) -> Any:
        return self.outcome

    def add_done_callback(self, call: Any) -> None:
        pass


class Shared:
    """Partition 1 in the hands of its owner and of a worker that took ten rows over."""

    def __init__(self, dispatch: Dispatch) -> None:
        self.dispatch = dispatch
        dispatch.partitions.todo.clear()
        self.owner, self.taker = Task("owner"), Task("taker")
        for task in (self.owner, self.taker):
            dispatch.in_flight[task] = [1]  # type: ignore[index]
        dispatch.handovers._taken.add(self.taker)  # type: ignore[arg-type]

    def end(self, task: Task, rows: int, part: bool = False) -> None:
        worker = OWNER if task is self.owner else TAKER
        counters = AttemptCounters(run="run", partition=1, task=task.key, rows=rows)
        summary: Any = SimpleNamespace()
        receipt = TaskReceipt(
            worker, Receipt("part", 9, summary, True) if part else None, counters, None, 1.0
        )
        task.status, task.outcome = "finished", [receipt]  # type: ignore[assignment]
        self.dispatch._take(task)  # type: ignore[arg-type]

    def lose(self, task: Task, error: BaseException) -> None:
        task.status, task.outcome = "error", error  # type: ignore[assignment]
        self.dispatch._take(task)  # type: ignore[arg-type]

    @property
    def todo(self) -> list[int]:
        return list(self.dispatch.partitions.todo)


@pytest.fixture
def shared(tmp_path, tiny_llama) -> Shared:
    prepared = prepare(load(write_job(tmp_path, tiny_llama)))
    return Shared(Dispatch(prepared, {1: 20}, threading.Event(), silent, Milestones()))


def died() -> BaseException:
    return KilledWorker("task", SimpleNamespace(address="tcp://gone"), 0)  # type: ignore[arg-type]


def test_a_partition_is_begun_anew_only_once_nobody_is_at_it_any_more(shared):
    shared.end(shared.owner, 10)
    assert shared.todo == [], "the other one goes on, and may seal it"
    shared.end(shared.taker, 10)
    assert shared.todo == [1]
    assert shared.dispatch.partitions.staged == {1: 20}


def test_a_partition_that_two_have_seen_covered_counts_once(shared):
    before = shared.dispatch.partitions.rows_committed
    shared.end(shared.taker, 10, part=True)
    shared.end(shared.owner, 10, part=True)
    assert shared.todo == []
    assert shared.dispatch.partitions.rows_committed == before + 20
    assert shared.dispatch.totals.counts.rows == 20, "what each of them generated does"


def test_an_attempt_that_is_lost_after_another_one_has_sealed_is_no_loss(shared):
    shared.end(shared.taker, 10, part=True)
    shared.lose(shared.owner, died())
    assert shared.todo == []
    assert not shared.dispatch.policy.suspected


def test_a_lost_taker_is_no_strike_and_the_partition_stays_whole(shared):
    for _ in range(5):
        shared.lose(shared.taker, died())
        shared.dispatch.in_flight[shared.taker] = [1]
        shared.dispatch.handovers._taken.add(shared.taker)
    assert shared.todo == []
    assert not shared.dispatch.policy.suspected
    assert shared.dispatch.tail._whole == {1}


def test_an_engine_that_always_fails_is_given_up_whoseever_rows_it_has(shared):
    error = EngineDied("broken", TAKER)
    error.launch, error.fruitless = 3, 3
    shared.lose(shared.taker, error)
    assert shared.dispatch.policy.able([OWNER, TAKER]) == [OWNER]


def test_a_lost_owner_is_a_strike_and_the_taker_goes_on(shared):
    shared.lose(shared.owner, died())
    assert shared.todo == []
    shared.end(shared.taker, 10)
    assert shared.todo == [1]


def test_rows_that_are_given_up_go_to_whom_they_were_asked_for(shared):
    sent: list[Any] = []

    class Client:
        def submit(self, work: Any, order: Any, tasks: Any, seconds: float, **how: Any) -> Any:
            sent.append((tasks[0], how["workers"]))
            return Task(how["key"])

    dispatch = shared.dispatch
    handover = Handover("owner", 1, OWNER, TAKER, 0.5, True)
    dispatch.tail._asked.append(handover)
    answer: Future[Any] = Future()
    dispatch.handovers._asked[answer] = handover
    dispatch.handovers.begin(Client())  # type: ignore[arg-type]
    assert not sent
    answer.set_result(([3, 7], 30.0))
    dispatch.handovers.begin(Client())  # type: ignore[arg-type]
    [(task, workers)] = sent
    assert (task.partition.index, task.rows, task.is_shared, workers) == (1, [3, 7], True, [TAKER])
    assert not dispatch.tail._asked
