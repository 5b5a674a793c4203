"""The tasks in flight."""

from __future__ import annotations

import queue
import uuid
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

from distributed import Client, Future

from batchrun.worker.order import WorkOrder


class Window:
    """`tasks` are in flight, each with its partitions; some are `kept` for certain workers. `finished` has those that
    ended, whatever came of them."""

    def __init__(self, order: WorkOrder) -> None:
        self.tasks: dict[Future, list[int]] = {}
        self.kept: dict[Future, list[str]] = {}
        self.finished: queue.Queue[Any] = queue.Queue()
        self._order = order

    @property
    def partitions(self) -> set[int]:
        """Those that tasks in flight are at."""
        return {index for members in self.tasks.values() for index in members}

    def submit(
        self,
        client: Client,
        members: list[int],
        work: Callable[..., Any],
        *arguments: Any,
        workers: Sequence[str] | None = None,
    ) -> Future:
        """Sends `work(order, *arguments)` to one of `workers`, or of all."""
        key = f"batchrun-{self._order.layout.plan_hash[:8]}-{members[0]:05d}-{uuid.uuid4().hex[:8]}"
        where = {} if workers is None else {"workers": workers}
        future = client.submit(work, self._order, *arguments, key=key, pure=False, retries=0, **where)
        self.tasks[future] = members
        future.add_done_callback(self.finished.put)
        return future

    def free_kept(self, workers: Collection[str]) -> Iterator[list[int]]:
        """Gives up what is kept for workers that are gone, which would wait for ever; the partitions of each."""
        self.kept = {future: able for future, able in self.kept.items() if future in self.tasks}
        for future, able in list(self.kept.items()):
            if not set(able).intersection(workers):
                del self.kept[future]
                members = self.tasks.pop(future)
                future.cancel()
                yield members
