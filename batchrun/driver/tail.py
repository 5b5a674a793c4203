"""The last minutes of a run: which worker leaves rows of a partition to which other one, so that all end together.

Pure logic; the driver asks the workers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass

from batchrun.driver.heartbeats import Heartbeats
from batchrun.worker.order import TaskReceipt

# Seconds until rows that are handed over are in the other engine, as long as nothing is known of that: a listing, the
# input, the prompts; of them, what two calls take; the weight of the newest attempt's.
TAKING_OVER, CALLS, NEWEST = 0.5, 0.1, 0.3
# What a handover has to save, in seconds and as a share of what its owner has left: estimates are no better than that.
WORTH_SECONDS, WORTH_SHARE = 0.2, 0.1
# Rows go to a worker that has to load its engine first only if the rest takes so many times as long as loading.
LOADINGS, LOAD_SECONDS = 2.0, 60.0
# Seconds in which an attempt that had nothing to give up is not asked again.
REFUSED = 1.0
# Seconds of work that have to be seen of a worker before its speed is known.
KNOWN = 1.0


@dataclass(frozen=True)
class Handover:
    """`owner` is to leave this share of what it has left of the partition to `taker`."""

    partition: int
    owner: str
    taker: str
    share: float


@dataclass
class _Attempt:
    """`left` rows. Heartbeats show late what was handed over; of one that has just begun, nothing at all."""

    left: float
    handed_over: int = 0
    is_seen: bool = True


class Tail:
    """What each worker has left and how fast it is, from heartbeats and receipts.

    A worker's time left is its rows by its speed. All of them would end together at the sum of rows by the sum of
    speeds: those with more give to those with less that have a free slot, as long as it is worth it. `rows` is how many
    each partition has. Partitions that lost an attempt stay whole: what is wrong with them is found by keeping still.
    """

    def __init__(self, rows: Callable[[int], int]) -> None:
        self._rows = rows
        self._attempts: dict[tuple[str, int], _Attempt] = {}
        # That ended, though older heartbeats still show them.
        self._over: set[tuple[str, int]] = set()
        self._whole: set[int] = set()
        self._refused: dict[tuple[str, int], float] = {}
        self._asked: list[Handover] = []
        self._looked: float | None = None
        # Of each worker: seconds at work, tokens of rows done in finished attempts and in all.
        self._busy: dict[str, float] = defaultdict(float)
        self._finished: dict[str, int] = defaultdict(int)
        self._done: dict[str, int] = {}
        self._rows_done = 0
        self._taking_over = TAKING_OVER
        self._loaded: set[str] = set()
        self._load_seconds = 0.0

    def see(self, now: float, beats: Heartbeats) -> None:
        """Takes in what the workers say of attempts in flight."""
        seconds, self._looked = now - (self._looked or now), now
        for view in beats.worker_views:
            if view.doing == "generating":
                self._busy[view.address] += seconds
            self._done[view.address] = self._finished[view.address] + view.counts.tokens
        self._rows_done = beats.total.rows
        loaded = [(worker, stats) for worker, stats in beats.engines if stats.pid]
        self._loaded = {worker for worker, _ in loaded}
        self._load_seconds = max((stats.load_seconds for _, stats in loaded), default=0.0) or LOAD_SECONDS
        before = self._attempts
        self._attempts = {place: one for place, one in before.items() if not one.is_seen}
        for worker, counters, _ in beats.activity:
            place = worker, counters.partition
            if place in self._over:
                continue
            known = before.get(place)
            if known is not None and not known.is_seen and not counters.taken_over:
                continue
            given = max(counters.handed_over, known.handed_over if known else 0)
            size = counters.taken_over or self._rows(counters.partition)
            left = max(0, size - counters.reused - counters.rows - given)
            self._attempts[place] = _Attempt(left, given)

    def ended(self, receipt: TaskReceipt) -> None:
        """An attempt has come to its end; its worker may have a slot free."""
        place = receipt.worker, receipt.counters.partition
        self._attempts.pop(place, None)
        self._over.add(place)
        self._finished[receipt.worker] += receipt.counters.tokens
        if opening := receipt.counters.opening:
            self._taking_over += NEWEST * (CALLS + opening - self._taking_over)

    def begins(self, partition: int) -> None:
        """A new attempt at the whole partition begins somewhere."""
        self._over = {place for place in self._over if place[1] != partition}

    def keep_whole(self, partition: int, taker: str | None = None) -> None:
        """An attempt at the partition was lost, with `taker` the one there."""
        self._whole.add(partition)
        if taker is not None:
            self._attempts.pop((taker, partition), None)

    def answered(self, now: float, asked: Handover, rows: int) -> None:
        """The owner gives up so many rows; if there are any, the taker begins with them now."""
        self._asked.remove(asked)
        place = asked.owner, asked.partition
        if not rows:
            self._refused[place] = now
            return
        if place in self._attempts:
            self._attempts[place].left = max(0, self._attempts[place].left - rows)
            self._attempts[place].handed_over += rows
        self._over.discard((asked.taker, asked.partition))
        self._attempts[asked.taker, asked.partition] = _Attempt(rows, is_seen=False)

    @property
    def partitions(self) -> set[int]:
        """Those that some worker is known to be at."""
        return {partition for _, partition in self._attempts}

    def handovers(
        self, now: float, slots: Mapping[str, int], splittable: Collection[int]
    ) -> Iterator[Handover]:
        """What is worth being asked for now; each counts as asked until `answered`. `slots` of the workers that get
        work, and the partitions that may be split."""
        while one := self._next(now, slots, splittable):
            self._asked.append(one)
            yield one

    def _next(self, now: float, slots: Mapping[str, int], splittable: Collection[int]) -> Handover | None:
        speeds = self._speeds(slots)
        left = dict.fromkeys(speeds, 0.0)
        running = dict.fromkeys(speeds, 0)
        for (worker, _), attempt in self._attempts.items():
            if worker in speeds:
                left[worker] += attempt.left
                running[worker] += 1
        takers = [
            worker for worker in speeds if running[worker] < slots[worker] and not self._is_asked(worker)
        ]
        owners = [worker for worker in speeds if left[worker] > 1 and not self._is_asked(worker)]
        at_work = [worker for worker in speeds if left[worker] or worker in self._loaded]
        if not takers or not owners:
            return None
        end = sum(left[worker] for worker in at_work) / sum(speeds[worker] for worker in at_work)
        for taker in sorted(takers, key=lambda worker: left[worker] / speeds[worker]):
            late = self._taking_over if taker in self._loaded else LOADINGS * self._load_seconds
            room = (end - late) * speeds[taker] - left[taker]
            for owner in sorted(owners, key=lambda worker: -left[worker] / speeds[worker]):
                rows = min(room, left[owner] - end * speeds[owner])
                worth = max(WORTH_SECONDS, WORTH_SHARE * left[owner] / speeds[owner])
                if owner == taker or rows < 1 or rows / speeds[owner] < worth:
                    continue
                if (partition := self._largest(now, owner, taker, splittable)) is not None:
                    share = min(1.0, rows / self._attempts[owner, partition].left)
                    return Handover(partition, owner, taker, share)
        return None

    def _speeds(self, workers: Collection[str]) -> dict[str, float]:
        """Rows a second of each worker, as far as tokens tell; none if nothing is known of any."""
        tokens = sum(self._done.values()) / max(1, self._rows_done)
        known = {
            worker: self._done[worker] / self._busy[worker] / tokens
            for worker in workers
            if self._busy[worker] >= KNOWN and self._done.get(worker)
        }
        if not known:
            return {}
        mean = sum(known.values()) / len(known)
        return {worker: known.get(worker, mean) for worker in workers}

    def _is_asked(self, worker: str) -> bool:
        return any(worker in (one.owner, one.taker) for one in self._asked)

    def _largest(self, now: float, owner: str, taker: str, splittable: Collection[int]) -> int | None:
        """The owner's partition with most left, of those that it may be asked for."""
        free = {
            partition: attempt.left
            for (worker, partition), attempt in self._attempts.items()
            if worker == owner
            and attempt.is_seen
            and attempt.left >= 2
            and partition in splittable
            and partition not in self._whole
            and (taker, partition) not in self._attempts
            and now - self._refused.get((owner, partition), -REFUSED) >= REFUSED
        }
        return max(free, key=lambda partition: free[partition], default=None)
