"""What a run has come to so far: what its attempts counted, its engines, its slowest partitions, its workers' time."""

from __future__ import annotations

import time
from collections import defaultdict

from batchrun.counters import Counters
from batchrun.driver.heartbeats import Heartbeats
from batchrun.engine.protocol import EngineStats
from batchrun.errors import BatchrunError
from batchrun.telemetry.record import SlowPartition
from batchrun.worker.order import TaskReceipt

# Partitions that are named in the run's record.
SLOWEST = 10


class RunTotals:
    """Added to with each receipt and heartbeat.

    `counts` are of finished attempts. `engines` by worker and process: those of earlier runs only with what they did in
    this one. `seconds` since the start, and `worker_time`, those of all workers by what they did, as of the last
    heartbeat.
    """

    def __init__(self) -> None:
        self.counts = Counters()
        self.engines: dict[tuple[str, int], EngineStats] = {}
        self.slowest: list[SlowPartition] = []
        self.seconds = 0.0
        self.worker_time: dict[str, float] = defaultdict(float)
        self._started = time.monotonic()
        # Of engines that earlier runs have left; known from the first look, which is before the first task.
        self._before: dict[tuple[str, int], EngineStats] | None = None

    def add(self, receipt: TaskReceipt) -> None:
        """Takes in an attempt that came to its end."""
        mine = receipt.counters
        self.counts += mine
        slow = SlowPartition(mine.partition, receipt.seconds, mine.rows, mine.tokens, receipt.worker)
        self.slowest = sorted([*self.slowest, slow], key=lambda s: -s.seconds)[:SLOWEST]
        self._note_engine(receipt.worker, receipt.engine)

    def add_lost(self, error: BaseException) -> None:
        """Takes in what an attempt had counted that is not tried again in this run."""
        if isinstance(error, BatchrunError) and error.counters is not None:
            self.counts += error.counters

    def see(self, beats: Heartbeats) -> None:
        """Takes in what the workers say of themselves now."""
        if self._before is None:
            self._before = {(address, stats.pid): stats for address, stats in beats.engines}
        for address, stats in beats.engines:
            self._note_engine(address, stats)
        before, self.seconds = self.seconds, time.monotonic() - self._started
        for worker in beats.worker_views:
            self.worker_time[worker.doing] += self.seconds - before

    def _note_engine(self, worker: str, stats: EngineStats | None) -> None:
        # None or no process: it has not loaded yet.
        if stats is None or not stats.pid:
            return
        key = (worker, stats.pid)
        if self._before and key in self._before:
            stats = stats.since(self._before[key])
            # Perhaps another model's.
            if not stats.requests:
                return
        # A heartbeat may be older than the receipt that came before it.
        if key not in self.engines or not stats.is_before(self.engines[key]):
            self.engines[key] = stats
