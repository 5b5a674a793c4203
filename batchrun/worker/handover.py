"""Rows that an attempt leaves to another worker, which would have nothing to do while they wait here."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.protocol import Request
from batchrun.worker.answer_lengths import AnswerLengths
from batchrun.worker.duplicates import Duplicates

# Tokens of a prompt that take an engine about as long as one new token.
PROMPT_TOKENS = 8
# Seconds for which what is left needs no new reckoning, unless somebody asks.
RECKONED = 0.2

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
    work: tokens of their prompts, and of their answers as `lengths` has them by now. A row goes with all of its
    requests. Rows whose answer others wait for stay, and so do rows that wait. `ask` is the event loop's; all else is
    called by the attempt's own thread. `rows` (bool, by row of the partition) are the attempt's: those given up are
    taken out of them.
    """

    def __init__(
        self,
        rows: NDArray[np.bool_],
        counters: WorkCounters,
        duplicates: Duplicates | None,
        lengths: AnswerLengths,
    ) -> None:
        # Has the attempt's thread come here soon.
        self.wake: Callable[[], None] = lambda: None
        self._rows, self._counters, self._duplicates, self._lengths = rows, counters, duplicates, lengths
        self._reached = -1
        self._in_engine: dict[int, _Sent] = {}
        self._lock = threading.Lock()
        self._asked: tuple[float, bool, Future[Given]] | None = None
        self._answering: Future[Given] | None = None
        # By row, the work of those that may come back.
        self._recalled: dict[int, float] = {}
        self._given: list[int] = []
        self._given_work = 0.0
        # Of rows in the engine and of all that have been there, the last reckoning; of rows that are done; how many
        # rows these are.
        self._work, self._mean_work, self._reckoned = 0.0, 1.0, -RECKONED
        self._work_done, self._rows_done = 0.0, 0
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
        ids, begun = [one.id for one in requests], sum(len(one.generated) for one in requests)
        most = max(one.max_new_tokens for one in requests)
        self._in_engine[row] = _Sent(ids, len(requests[0].token_ids), limit, most, begun)

    def ended(self, row: int, tokens: int) -> None:
        """The engine is done with the row; `tokens` are those of all its answers."""
        if sent := self._in_engine.pop(row, None):
            # Of scored rows some more come back.
            tokens = min(tokens, sent.most * len(sent.ids))
            self._lengths.add(sent.prompt_tokens, tokens / len(sent.ids))
            self._work_done += max(0, tokens - sent.begun) + sent.prompt_work
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
        self._give([row], self._recalled[row])
        return True

    def serve(self, recall: Recall) -> None:
        """See `engine.process.Recalls`."""
        self._counters.work_done = self._work_done
        now = time.monotonic()
        if now - self._reckoned >= RECKONED or self._asked is not None:
            self._reckoned = now
            self._reckon()
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
        works = zip(self._in_engine, self._works().tolist(), strict=True)
        candidates = {row: work for row, work in works if self._is_free(row)}
        if left <= 0 or not candidates:
            self._answer()
            return
        order = sorted(candidates, key=lambda row: candidates[row], reverse=is_longest_first)
        self._recalled = candidates
        recall([self._in_engine[row].ids for row in order], [candidates[row] for row in order], left)

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

    def _reckon(self) -> None:
        """What is left, by what is known now of answers' lengths."""
        self._work = float(self._works().sum())
        rows = len(self._in_engine) + self._rows_done
        self._mean_work = (self._work + self._work_done) / rows if rows else 1.0
        unsent = np.count_nonzero(self._rows[self._reached + 1 :])
        self._counters.work_left = self._work + self._mean_work * int(unsent)

    def _works(self) -> NDArray[np.float64]:
        """Of the rows in the engine, in order."""
        sent = self._in_engine.values()
        if not sent:
            return np.zeros(0)
        prompts, limits, samples, begun = np.array(
            [(one.prompt_tokens, one.most, len(one.ids), one.begun) for one in sent]
        ).T
        answers = self._lengths.expected(prompts, limits) * samples - begun
        works: NDArray[np.float64] = np.maximum(answers, samples) + prompts * samples / PROMPT_TOKENS
        return works

    def _is_free(self, row: int) -> bool:
        return self._duplicates is None or not self._duplicates.is_waited_for(row)

    def _give(self, rows: list[int], work: float) -> None:
        self._rows[rows] = False
        self._given += rows
        self._given_work += work
        self._counters.handed_over += len(rows)

    def _answer(self) -> None:
        given = sorted(self._given), self._given_work
        self._given, self._given_work, self._recalled = [], 0.0, {}
        with self._lock:
            answer, self._answering = self._answering, None
        assert answer is not None
        answer.set_result(given)


@dataclass(slots=True)
class _Sent:
    """A row in the engine: the ids of its requests, the tokens of its prompt, its own limit of new tokens, if it has
    one, the limit in force, and how many tokens earlier attempts had generated of all its answers."""

    ids: list[int]
    prompt_tokens: int
    limit: int
    most: int
    begun: int

    @property
    def prompt_work(self) -> float:
        """That of all its requests."""
        return len(self.ids) * self.prompt_tokens / PROMPT_TOKENS
