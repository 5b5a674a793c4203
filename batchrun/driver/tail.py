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
WORTH_SECONDS, WORTH_SHARE = 0.1, 0.05
# A worker of less than this share of another one's speed is slower.
SLOWER = 0.9
# Rows go to a worker that has to load its engine first only if the rest takes so many times as long as loading.
LOADINGS, LOAD_SECONDS = 2.0, 60.0
# Seconds in which an attempt that had nothing to give up is not asked again.
REFUSED = 1.0
# Seconds of work that have to be seen of a worker before its speed is known.
KNOWN = 1.0


@dataclass(frozen=True)
class Handover:
    """`owner` is to leave this share of what its task has left of the partition to `taker`.

    That are its longest rows, which would be the last ones otherwise, or its shortest, if the taker is the slower one.
    """

    task: str
    partition: int
    owner: str
    taker: str
    share: float
    is_longest_first: bool


@dataclass
class _Attempt:
    """`left` in work, see `worker.handover`. Heartbeats show late what was handed over: `left` is without what they do
    not show. Of an attempt that has just taken rows over, they show nothing at all."""

    worker: str
    partition: int
    left: float
    handed_over: int = 0
    is_seen: bool = True


class Tail:
    """What each worker has left and how fast it is, from heartbeats and receipts. Tokens of answers under way
    count as done, of an engine that tells them.

    All of them would end together after the sum of what is left by the sum of speeds. Those that take longer give rows
    to those that take less and have a free slot, as long as it is worth it. `rows` is how many each partition has.
    Partitions that lost an attempt stay whole: what is wrong with them is found by keeping still.
    """

    def __init__(self, rows: Callable[[int], int]) -> None:
        self._rows = rows
        # By the keys of their tasks.
        self._attempts: dict[str, _Attempt] = {}
        # Of each worker: what those that have ended had left at the last look.
        self._ended: dict[str, float] = defaultdict(float)
        # Of each worker: tokens of answers that are not whole, so work that is done and still among what is left.
        self._under_way: dict[str, float] = defaultdict(float)
        self._whole: set[int] = set()
        self._refused: dict[str, float] = {}
        self._asked: list[Handover] = []
        self._looked: float | None = None
        # Of each worker: seconds at work, work done in finished attempts and in all; the rows of all work.
        self._busy: dict[str, float] = defaultdict(float)
        self._finished: dict[str, float] = defaultdict(float)
        self._done: dict[str, float] = {}
        self._rows_done = 0
        self._taking_over = TAKING_OVER
        self._loaded: set[str] = set()
        self._load_seconds = LOAD_SECONDS

    @property
    def tasks(self) -> set[str]:
        """The keys of those that some worker is known to be at."""
        return {*self._attempts}

    def see(self, now: float, beats: Heartbeats, tasks: Collection[str]) -> None:
        """Takes in what the workers say of the tasks in flight."""
        seconds, self._looked = now - (self._looked or now), now
        for view in beats.worker_views:
            if view.doing == "generating":
                self._busy[view.address] += seconds
        self._done = dict(self._finished)
        self._rows_done = beats.total.rows
        loaded = [(worker, stats) for worker, stats in beats.engines if stats.pid]
        self._loaded = {worker for worker, _ in loaded}
        self._under_way.clear()
        for worker, stats in loaded:
            self._under_way[worker] += stats.gauges.get("active_output_tokens", 0.0)
        self._load_seconds = max((stats.load_seconds for _, stats in loaded), default=0.0) or LOAD_SECONDS
        self._ended.clear()
        before = self._attempts
        self._attempts = {key: one for key, one in before.items() if not one.is_seen and key in tasks}
        for worker, counters, _ in beats.activity:
            known = before.get(counters.task)
            if counters.task not in tasks or (known and not known.is_seen and not counters.taken_over):
                continue
            self._done[worker] = self._done.get(worker, 0.0) + counters.work_done
            left = counters.work_left
            if not counters.pulled:
                left = self._mean_work * (counters.taken_over or self._rows(counters.partition))
            if known and known.handed_over > counters.handed_over:
                left = min(left, known.left)
            handed_over = max(counters.handed_over, known.handed_over if known else 0)
            self._attempts[counters.task] = _Attempt(worker, counters.partition, left, handed_over)

    def ended(self, task: str) -> None:
        """The task has come to its end; its worker may have a slot free."""
        if attempt := self._attempts.pop(task, None):
            self._ended[attempt.worker] += attempt.left

    def book(self, receipt: TaskReceipt) -> None:
        """What an attempt that has ended had done."""
        self._finished[receipt.worker] += receipt.counters.work_done
        if opening := receipt.counters.opening:
            self._taking_over += NEWEST * (CALLS + opening - self._taking_over)

    def keep_whole(self, partition: int) -> None:
        """An attempt at the partition was lost."""
        self._whole.add(partition)

    def handovers(self, now: float, slots: Mapping[str, int], tasks: Collection[str]) -> Iterator[Handover]:
        """What is worth being asked for now; each counts as asked until `answered`. `slots` of the workers that get
        work, and the tasks that may be asked."""
        while one := self._next(now, slots, tasks):
            self._asked.append(one)
            yield one

    def answered(self, now: float, asked: Handover, rows: int, work: float) -> None:
        """The owner gives up so many rows, of so much work."""
        self._asked.remove(asked)
        if not rows:
            self._refused[asked.task] = now
        elif owner := self._attempts.get(asked.task):
            owner.left = max(0.0, owner.left - work)
            owner.handed_over += rows

    def begun(self, task: str, handover: Handover, work: float) -> None:
        """The taker begins with so much work, in a task of its own."""
        self._attempts[task] = _Attempt(handover.taker, handover.partition, work, is_seen=False)

    def _next(self, now: float, slots: Mapping[str, int], tasks: Collection[str]) -> Handover | None:
        speeds = self._speeds(slots)
        left = self._left(now, speeds)
        running = [attempt.worker for attempt in self._attempts.values()]
        asked = {worker for one in self._asked for worker in (one.owner, one.taker)}
        takers = [
            worker for worker in speeds if running.count(worker) < slots[worker] and worker not in asked
        ]
        owners = [worker for worker in speeds if left[worker] > 0 and worker not in asked]
        if not takers or not owners:
            return None
        at_work = [worker for worker in speeds if left[worker] or worker in self._loaded]
        work, speed = sum(left[worker] for worker in at_work), sum(speeds[worker] for worker in at_work)
        for taker in sorted(takers, key=lambda worker: left[worker] / speeds[worker]):
            late = self._taking_over if taker in self._loaded else LOADINGS * self._load_seconds
            # Until then it has work of its own.
            begins = max(late, left[taker] / speeds[taker])
            end = work / speed
            if taker not in at_work:
                end = (work + begins * speeds[taker]) / (speed + speeds[taker])
            room = (end - begins) * speeds[taker]
            for owner in sorted(owners, key=lambda worker: -left[worker] / speeds[worker]):
                some = min(room, left[owner] - end * speeds[owner])
                worth = max(WORTH_SECONDS, WORTH_SHARE * left[owner] / speeds[owner])
                if owner == taker or some / speeds[owner] < worth:
                    continue
                if task := self._largest(now, owner, tasks):
                    attempt = self._attempts[task]
                    share = min(1.0, some / attempt.left)
                    is_slower = speeds[taker] < SLOWER * speeds[owner]
                    return Handover(task, attempt.partition, owner, taker, share, not is_slower)
        return None

    @property
    def _mean_work(self) -> float:
        return sum(self._done.values()) / max(1, self._rows_done)

    def _speeds(self, workers: Collection[str]) -> dict[str, float]:
        """Work a second of each worker, where nothing is known of it as of the others; empty if of none."""
        known = {
            worker: (self._done[worker] + self._under_way[worker]) / self._busy[worker]
            for worker in workers
            if self._busy[worker] >= KNOWN and self._done.get(worker)
        }
        mean = sum(known.values()) / len(known) if known else 0.0
        return {worker: known.get(worker, mean) for worker in workers} if known else {}

    def _left(self, now: float, speeds: Mapping[str, float]) -> dict[str, float]:
        """Of each worker, as it should be by now: it has gone on since the last look."""
        left = {worker: self._ended[worker] - self._under_way[worker] for worker in speeds}
        for attempt in self._attempts.values():
            if attempt.worker in left:
                left[attempt.worker] += attempt.left
        age = now - (self._looked or now)
        return {worker: max(0.0, work - age * speeds[worker]) for worker, work in left.items()}

    def _largest(self, now: float, owner: str, tasks: Collection[str]) -> str | None:
        """The owner's task with most left, of those that it may be asked for."""
        free = {
            task: attempt.left
            for task, attempt in self._attempts.items()
            if attempt.worker == owner
            and attempt.is_seen
            and attempt.left > 0
            and attempt.partition not in self._whole
            and task in tasks
            and now - self._refused.get(task, -REFUSED) >= REFUSED
        }
        return max(free, key=lambda task: free[task], default=None)
