"""Receipts of tasks that end at the same time cost one round trip between them, not one each."""

from __future__ import annotations

import queue
import threading
import time
from types import SimpleNamespace
from typing import Any

import pytest
from distributed import Client, Future

from batchrun.driver.dispatch import Dispatch
from batchrun.driver.receipts import ReceiptReader
from batchrun.errors import StorageError

TASKS = 20


def _square(number: int) -> int:
    return number * number


def _fail(what: str) -> int:
    raise StorageError(what)


@pytest.fixture
def asked(cluster: Client, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """The keys of each request for results that the client sends."""
    requests: list[list[str]] = []
    send = cluster._gather_remote

    async def counted(*how: Any) -> Any:
        requests.append(list(cluster._gather_keys))
        return await send(*how)

    monkeypatch.setattr(cluster, "_gather_remote", counted)
    return requests


def _ended(futures: list[Future]) -> list[Future]:
    deadline = time.monotonic() + 60
    while not all(future.done() for future in futures):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return futures


def test_receipts_that_are_there_come_in_one_request(cluster: Client, asked: list[list[str]]) -> None:
    futures = _ended([cluster.submit(_square, i, pure=False) for i in range(TASKS)])
    reader = ReceiptReader(threading.Event())
    assert [reader.read(future, futures[i + 1 :]) for i, future in enumerate(futures)] == [
        i * i for i in range(TASKS)
    ]
    assert [len(keys) for keys in asked] == [TASKS]


def test_a_task_that_is_not_over_is_not_waited_for(cluster: Client, asked: list[list[str]]) -> None:
    done = _ended([cluster.submit(_square, i, pure=False) for i in range(2)])
    other = cluster.submit(time.sleep, 5, pure=False)
    reader = ReceiptReader(threading.Event())
    assert [reader.read(done[0], [other, done[1]]), reader.read(done[1])] == [0, 1]
    assert [len(keys) for keys in asked] == [2]
    other.cancel()


def test_a_task_that_failed_says_so_when_it_is_read(cluster: Client) -> None:
    bad = cluster.submit(_fail, "no space left", pure=False, retries=0)
    good = cluster.submit(_square, 3, pure=False)
    _ended([bad, good])
    reader = ReceiptReader(threading.Event())
    assert reader.read(good, [bad]) == 9
    with pytest.raises(StorageError, match="no space left"):
        reader.read(bad)


def test_a_run_reads_with_one_receipt_those_that_wait_behind_it(
    cluster: Client, asked: list[list[str]]
) -> None:
    first, *others = _ended([cluster.submit(list, pure=False) for _ in range(4)])
    run: Any = SimpleNamespace(
        reader=ReceiptReader(threading.Event()),
        in_flight={future: [i] for i, future in enumerate([first, *others])},
        trials=SimpleNamespace(running={}),
        handovers=SimpleNamespace(end=lambda future: False),
        finished=queue.Queue(),
        _again_alone=lambda members: None,
    )
    for future in others:
        run.finished.put(future)
    for future in (first, *others):
        Dispatch._take(run, future)
    assert not run.in_flight
    assert [len(keys) for keys in asked] == [4]
