"""Rows on their way from a worker that has much left to one that has nothing to do."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
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
    """`taken` are the tasks in the window that have got rows of others. `task_of` makes a partition's task."""

    def __init__(self, run: str, tail: Tail, window: Window, task_of: Callable[[int], Task]) -> None:
        self.taken: dict[Future, Handover] = {}
        self._run, self._tail, self._window, self._task_of = run, tail, window, task_of
        self._asked: dict[Answer[Given], Handover] = {}

    def begin(self, client: Client) -> None:
        """Sends rows that their owners have given up to whom they are for."""
        for handover, rows in self._answered():
            task = replace(self._task_of(handover.partition), rows=rows, is_shared=True)
            future = self._window.submit(
                client, [handover.partition], run_partitions, [task], 0.0, workers=[handover.taker]
            )
            self._window.kept[future], self.taken[future] = [handover.taker], handover

    def ask(self, client: Client, slots: Mapping[str, int], tasks: Sequence[Sequence[int]]) -> None:
        """Asks for what is worth it: `slots` are the workers', `tasks` the partitions of each that may be split."""
        # One that no worker shows yet is about to take a slot.
        if all(self._tail.partitions.intersection(members) for members in tasks):
            alone = {members[0] for members in tasks if len(members) == 1}
            for handover in self._tail.handovers(time.monotonic(), slots, alone):
                answer = asyncio.run_coroutine_threadsafe(
                    self._rows(client, handover), client.loop.asyncio_loop
                )
                self._asked[answer] = handover
                # The driver has its eye on what finishes.
                answer.add_done_callback(self._window.finished.put)

    def _answered(self) -> Iterator[tuple[Handover, list[int]]]:
        for answer, handover in list(self._asked.items()):
            if answer.done():
                del self._asked[answer]
                rows, work = answer.result()
                self._tail.answered(time.monotonic(), handover, len(rows), work)
                log.info("%d rows handed over: %s", len(rows), handover)
                if rows:
                    yield handover, rows

    async def _rows(self, client: Client, handover: Handover) -> Given:
        words = self._run, handover.partition, handover.share, handover.is_longest_first
        call = client.run(hand_over, *words, workers=[handover.owner], on_error="ignore", asynchronous=True)
        try:
            found = await asyncio.wait_for(call, 2 * HANDOVER_SECONDS)
        except (OSError, TimeoutError):
            # It is gone, or as good as that: its attempt is judged as any lost one.
            return [], 0.0
        given: Given = found.get(handover.owner, ([], 0.0))
        return given
