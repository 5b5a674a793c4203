"""Rows on their way from a worker that has much left to one that has nothing to do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future as Answer
from dataclasses import replace

from distributed import Client, Future

from batchrun.driver.tail import Handover, Tail
from batchrun.driver.window import Window
from batchrun.worker.handover import Given
from batchrun.worker.order import Task
from batchrun.worker.plugin import HANDOVER_SECONDS, hand_over
from batchrun.worker.task import run_partitions

log = logging.getLogger(__name__)


class Handovers:
    """Asks tasks in the window for rows, as the `tail` says, and sends them on. `task_of` makes a partition's task."""

    def __init__(self, tail: Tail, window: Window, task_of: Callable[[int], Task]) -> None:
        self._taken: set[Future] = set()
        self._tail, self._window, self._task_of = tail, window, task_of
        self._asked: dict[Answer[Given], Handover] = {}

    def end(self, task: Future) -> bool:
        """A task has come to its end; whether it had got rows of another one."""
        self._tail.ended(task.key)
        is_taken = task in self._taken
        self._taken.discard(task)
        return is_taken

    def begin(self, client: Client) -> None:
        """Sends rows that their owners have given up to whom they are for."""
        for handover, rows, work in self._answered():
            task = replace(self._task_of(handover.partition), rows=rows, is_shared=True)
            future = self._window.submit(
                client, [handover.partition], run_partitions, [task], 0.0, workers=[handover.taker]
            )
            self._window.kept[future] = [handover.taker]
            self._taken.add(future)
            self._tail.begun(future.key, handover, work)

    def ask(self, client: Client, slots: Mapping[str, int], tasks: Collection[str]) -> None:
        """Asks for what is worth it: `slots` are the workers', `tasks` the keys of those that may be asked."""
        # One that no worker shows yet is about to take a slot.
        if self._tail.tasks.issuperset(future.key for future in self._window.tasks):
            for handover in self._tail.handovers(time.monotonic(), slots, tasks):
                answer = asyncio.run_coroutine_threadsafe(
                    self._rows(client, handover), client.loop.asyncio_loop
                )
                self._asked[answer] = handover
                # The driver has its eye on what finishes.
                answer.add_done_callback(self._window.finished.put)

    def _answered(self) -> Iterator[tuple[Handover, list[int], float]]:
        for answer, handover in list(self._asked.items()):
            if answer.done():
                del self._asked[answer]
                rows, work = answer.result()
                self._tail.answered(time.monotonic(), handover, len(rows), work)
                log.info("%d rows handed over: %s", len(rows), handover)
                if rows:
                    yield handover, rows, work

    async def _rows(self, client: Client, handover: Handover) -> Given:
        words = handover.task, handover.share, handover.is_longest_first
        call = client.run(hand_over, *words, workers=[handover.owner], asynchronous=True)
        try:
            found = await asyncio.wait_for(call, 2 * HANDOVER_SECONDS)
        except (OSError, TimeoutError):
            # It is gone, or as good as that: its attempt is judged as any lost one.
            return [], 0.0
        given: Given = found.get(handover.owner, ([], 0.0))
        return given
