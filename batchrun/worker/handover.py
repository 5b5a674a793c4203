"""Rows that an attempt leaves to another worker, which would have nothing to do while they wait here."""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.protocol import Request
from batchrun.worker.duplicates import Duplicates

# Tokens of a prompt that take an engine about as long as one new token.
PROMPT_TOKENS = 8

Recall = Callable[[Sequence[Sequence[int]], Sequence[float], float], None]
Given = tuple[list[int], float]
"""Rows that are given up, and their work."""


class WorkCounters(Protocol):
    """What is counted here: rows sent are not, once they come back."""

    handed_over: int
    pulled: int
    sent_tokens: int
    sent_limits: int
    work_done: float
    work_left: float


class Handover:
    """What has become of the rows of one attempt, and which of them are given up when the driver asks for some.

    First those whose prompts have not been made, from the end; then those that the engine has not begun with, by their
    work. A row goes with all of its requests. Rows whose answer others wait for stay, and so do rows
    that wait. `ask` is the event loop's; all else is called by the attempt's own thread. `rows` (bool, by row of the
    partition) are the attempt's: those given up are taken out of them.
    """

    def __init__(
        self, rows: NDArray[np.bool_], counters: WorkCounters, duplicates: Duplicates | None
    ) -> None:
        # Has the attempt's thread come here soon.
        self.wake: Callable[[], None] = lambda: None
        self._rows, self._counters, self._duplicates = rows, counters, duplicates
        self._reached = -1
        # By row: the ids of its requests, their work, the tokens of its prompt and its own limit.
        self._in_engine: dict[int, _Sent] = {}
        self._lock = threading.Lock()
        self._asked: tuple[float, bool, Future[Given]] | None = None
        self._answering: Future[Given] | None = None
        self._recalled: Collection[int] = ()
        self._given: list[int] = []
        self._given_work = 0.0
        # Of rows in the engine, of rows that are done, and how many rows these are.
        self._work, self._work_done, self._rows_done = 0.0, 0.0, 0
        self._closed = False

    def ask(self, share: float, is_longest_first: bool) -> Future[Given]:
        """The rows that are given up, about so much of the work that is left; none where there is nothing to give, and
        while somebody else is asking."""
        answer: Future[Given] = Future()
        with self._lock:
            if self._closed or self._asked is not None or self._answering is not None:
                answer.set_result(([], 0.0))
                return answer
            self._asked = share, is_longest_first, answer
        self.wake()
        return answer

    def reach(self, row: int) -> bool:
        """The attempt has come to this row, and to no later one; whether it is still its own."""
        self._reached = row
        return bool(self._rows[row])

    def sent(self, row: int, requests: Sequence[Request], limit: int) -> None:
        """The row's requests go to the engine."""
        work = sum(one.remaining + len(one.token_ids) / PROMPT_TOKENS for one in requests)
        ids = [one.id for one in requests]
        self._in_engine[row] = _Sent(ids, work, len(requests[0].token_ids), limit)
        self._work += work

    def ended(self, row: int) -> None:
        """The engine is done with the row."""
        if sent := self._in_engine.pop(row, None):
            self._work -= sent.work
            self._work_done += sent.work
            self._rows_done += 1

    def came_back(self, row: int) -> bool:
        """Whether a row that the engine has let go of was asked back."""
        if row not in self._recalled or row not in self._in_engine:
            return False
        sent = self._in_engine.pop(row)
        self._counters.pulled -= 1
        self._counters.sent_tokens -= sent.prompt_tokens
        self._counters.sent_limits -= sent.limit
        if self._duplicates is not None:
            self._duplicates.let_go(row)
        self._work -= sent.work
        self._give([row], sent.work)
        return True

    def serve(self, recall: Recall) -> None:
        """See `engine.process.Recalls`."""
        self._counters.work_done = self._work_done
        unsent = np.count_nonzero(self._rows[self._reached + 1 :])
        self._counters.work_left = self._work + self._mean_work * int(unsent)
        if self._answering is not None:
            self._answer()
        if self._asked is None:
            return
        with self._lock:
            (share, is_longest_first, self._answering), self._asked = self._asked, None
        # Who asked may have given up.
        if not self._answering.set_running_or_notify_cancel():
            self._answering = None
            return
        left = self._give_unsent(share)
        candidates = {row: sent for row, sent in self._in_engine.items() if self._is_free(row)}
        if left <= 0 or not candidates:
            self._answer()
            return
        order = sorted(candidates, key=lambda row: candidates[row].work, reverse=is_longest_first)
        self._recalled = candidates.keys()
        recall([candidates[row].ids for row in order], [candidates[row].work for row in order], left)

    def close(self) -> None:
        """Nothing is given up any more."""
        with self._lock:
            self._closed = True
            if self._asked is not None:
                self._asked[-1].set_result(([], 0.0))
                self._asked = None
        if self._answering is not None:
            self._answer()

    def _give_unsent(self, share: float) -> float:
        """Gives up rows that the engine does not have; how much more work is to be given up."""
        unsent = np.flatnonzero(self._rows[self._reached + 1 :]) + self._reached + 1
        mean = self._mean_work
        wanted = share * (self._work + mean * len(unsent))
        count = min(len(unsent), round(wanted / mean))
        self._give(unsent[len(unsent) - count :].tolist(), mean * count)
        # Half a row more or less is as near as it gets.
        return wanted - mean * (count + 0.5)

    @property
    def _mean_work(self) -> float:
        """Of a row, by those that have been sent."""
        rows = len(self._in_engine) + self._rows_done
        return (self._work + self._work_done) / rows if rows else 1.0

    def _is_free(self, row: int) -> bool:
        return self._duplicates is None or not self._duplicates.is_waited_for(row)

    def _give(self, rows: list[int], work: float) -> None:
        self._rows[rows] = False
        self._given += rows
        self._given_work += work
        self._counters.handed_over += len(rows)

    def _answer(self) -> None:
        given = sorted(self._given), self._given_work
        self._given, self._given_work, self._recalled = [], 0.0, ()
        with self._lock:
            answer, self._answering = self._answering, None
        assert answer is not None
        answer.set_result(given)


class _Sent:
    """A row in the engine."""

    __slots__ = ("ids", "limit", "prompt_tokens", "work")

    def __init__(self, ids: list[int], work: float, prompt_tokens: int, limit: int) -> None:
        self.ids, self.work, self.prompt_tokens, self.limit = ids, work, prompt_tokens, limit
