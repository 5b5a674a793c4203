"""Who leaves rows to whom at the end of a run: the driver's decisions, with workers and a clock that are made up."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.counters import Counters
from batchrun.driver.heartbeats import Heartbeats
from batchrun.driver.tail import Handover, Tail
from batchrun.engine.protocol import EngineStats
from batchrun.telemetry.progress import WorkerView
from batchrun.worker.generation import AttemptCounters
from batchrun.worker.order import TaskReceipt

STEP = 0.02
POLL, HEARTBEAT = 1.0, 0.5
CALL = 0.1


@dataclass
class Attempt:
    """Rows that it has to do, the longest first; the first one is under way. `opens` is when the engine gets them."""

    rows: list[int]
    opens: float
    counters: AttemptCounters
    taken: int = 0
    spent: float = 0.0


@dataclass
class Worker:
    speed: float
    slots: int
    is_loaded: bool = True
    attempts: dict[str, Attempt] = field(default_factory=dict)

    def at(self) -> set[int]:
        return {one.counters.partition for one in self.attempts.values()}


class Simulation:
    """A run: `work` of each row of each partition. Workers die at `deaths` and come again under another name."""

    def __init__(
        self, work: list[list[float]], workers: list[Worker], deaths: list[float], seed: int
    ) -> None:
        self.work, self.now, self.random = work, 0.0, random.Random(seed)
        self.workers = {f"w{i}": one for i, one in enumerate(workers)}
        self.deaths = deaths
        self.todo = list(range(len(work)))
        self.staged: list[set[int]] = [set() for _ in work]
        self.parts: set[int] = set()
        self.twice = self.handovers = self.tasks = 0
        self.asked: list[tuple[float, Handover]] = []
        self.finished = Counters()
        self.tail = Tail(lambda index: len(work[index]))
        self.next_poll = 0.0
        self.idle: list[tuple[float, str]] = []

    def run(self) -> float:
        """When the last part was there."""
        while len(self.parts) < len(self.work):
            assert self.now < 10_000, "it never ends"
            self.tick()
        return self.now

    def tick(self) -> None:
        self.now += STEP
        if self.deaths and self.now >= self.deaths[0]:
            self.deaths.pop(0)
            self.kill(self.random.choice(sorted(self.workers)))
        for name, worker in list(self.workers.items()):
            self.work_on(name, worker)
        if self.now >= self.next_poll:
            self.next_poll = self.now + POLL
            self.tail.see(self.now, self.beats(), self.in_flight())
        for name, worker in self.workers.items():
            while self.todo and len(worker.attempts) < worker.slots:
                self.begin(name, self.todo.pop(0))
        self.share()
        for name, worker in self.workers.items():
            # What a loss puts first may come in between: Dask has one more wait then.
            assert len(worker.attempts) <= worker.slots + 1, f"{name} has more than it has slots for"

    def in_flight(self) -> set[str]:
        return {key for worker in self.workers.values() for key in worker.attempts}

    def begin(self, name: str, index: int, rows: list[int] | None = None) -> str:
        """The task's key."""
        self.tasks += 1
        key = f"task {self.tasks}"
        counters = AttemptCounters(run="run", partition=index, task=key, doing="reading")
        own = [row for row in range(len(self.work[index])) if row not in self.staged[index]]
        if rows is None:
            counters.reused = len(self.staged[index])
        else:
            own = [row for row in own if row in rows]
        own.sort(key=lambda row: -self.work[index][row])
        taken = 0 if rows is None else len(own)
        self.workers[name].attempts[key] = Attempt(own, self.now + 0.15, counters, taken)
        return key

    def work_on(self, name: str, worker: Worker) -> None:
        left = STEP * worker.speed
        for key, attempt in list(worker.attempts.items()):
            if attempt.opens > self.now:
                continue
            counters, index = attempt.counters, attempt.counters.partition
            counters.doing, counters.pulled, counters.opening = "generating", len(self.work[index]), 0.15
            counters.taken_over = attempt.taken
            while attempt.rows and left > 0:
                work = self.work[index][attempt.rows[0]]
                if attempt.spent + left < work:
                    attempt.spent, left = attempt.spent + left, 0.0
                    break
                left -= work - attempt.spent
                attempt.spent = 0.0
                row = attempt.rows.pop(0)
                self.twice += row in self.staged[index]
                self.staged[index].add(row)
                counters.rows += 1
                counters.work_done += work
            counters.work_left = sum(self.work[index][row] for row in attempt.rows)
            if not attempt.rows:
                self.end(name, worker, key)
        if left > STEP * worker.speed / 2:
            self.idle.append((self.now, name))

    def end(self, name: str, worker: Worker, key: str) -> None:
        counters = worker.attempts.pop(key).counters
        self.finished += counters
        self.tail.ended(key)
        self.tail.book(TaskReceipt(name, None, counters, None, 0.0))
        if len(self.staged[counters.partition]) == len(self.work[counters.partition]):
            self.parts.add(counters.partition)
        self.requeue(counters.partition)

    def requeue(self, index: int) -> None:
        at_it = [name for name, worker in self.workers.items() if index in worker.at()]
        if index not in self.parts and not at_it and index not in self.todo:
            self.todo.append(index)

    def kill(self, name: str) -> None:
        worker = self.workers.pop(name)
        self.workers[f"{name}'"] = Worker(worker.speed, worker.slots)
        for key, attempt in worker.attempts.items():
            self.tail.ended(key)
            self.tail.keep_whole(attempt.counters.partition)
            self.requeue(attempt.counters.partition)

    def share(self) -> None:
        for due, one in [asked for asked in self.asked if asked[0] <= self.now]:
            self.asked.remove((due, one))
            rows, work = self.give(one)
            self.tail.answered(self.now, one, len(rows), work)
            if rows and one.taker in self.workers:
                self.handovers += 1
                self.tail.begun(self.begin(one.taker, one.partition, rows), one, work)
            elif rows:
                self.requeue(one.partition)
        if self.todo or self.in_flight() - self.tail.tasks:
            return
        slots = {name: worker.slots for name, worker in self.workers.items()}
        for one in self.tail.handovers(self.now, slots, self.in_flight()):
            assert one.owner != one.taker
            self.asked.append((self.now + CALL, one))

    def give(self, one: Handover) -> tuple[list[int], float]:
        owner = self.workers.get(one.owner)
        attempt = owner.attempts.get(one.task) if owner else None
        if attempt is None or attempt.opens > self.now:
            return [], 0.0
        work = self.work[one.partition]
        wanted = one.share * sum(work[row] for row in attempt.rows)
        rows: list[int] = []
        for row in attempt.rows[1:] if one.is_longest_first else attempt.rows[:0:-1]:
            if sum(work[r] for r in rows) + work[row] / 2 > wanted:
                break
            rows.append(row)
        attempt.rows = [row for row in attempt.rows if row not in rows]
        attempt.counters.handed_over += len(rows)
        return rows, sum(work[row] for row in rows)

    def beats(self) -> Heartbeats:
        """As of the last heartbeat, which is older than the look at it."""
        beats = Heartbeats(self.finished)
        for name, worker in self.workers.items():
            doing = "generating" if worker.attempts else "idle"
            beats.worker_views.append(
                WorkerView(name, "host", len(worker.attempts), worker.slots, 0, doing, None)
            )
            if worker.is_loaded or worker.attempts:
                beats.engines.append((name, EngineStats(pid=1, load_seconds=20.0)))
            for attempt in worker.attempts.values():
                seen = AttemptCounters(**{**vars(attempt.counters)})
                beats.total = beats.total + seen
                beats.activity.append((name, seen, 0))
        return beats

    def idle_share(self, end: float) -> float:
        window = 0.05 * end
        late = sum(at > end - window for at, _ in self.idle)
        return late * STEP / (window * len(self.workers))


def skewed(partitions: int, rows: int, seed: int) -> list[list[float]]:
    rng = np.random.default_rng(seed)
    return [np.clip(rng.lognormal(3, 0.7, rows), 5, 150).tolist() for _ in range(partitions)]


@pytest.mark.parametrize("seed", range(3))
def test_two_workers_one_at_half_speed_end_together(seed):
    one = Simulation(skewed(40, 100, seed), [Worker(800, 2), Worker(400, 2)], [], seed)
    end = one.run()
    ideal = sum(map(sum, one.work)) / 1200
    assert one.twice == 0, "nothing is generated twice"
    assert one.idle_share(end) < 0.02
    assert end < 1.01 * ideal + 0.5
    assert 1 <= one.handovers <= 12


def test_eight_workers_end_together_though_the_last_partitions_are_two():
    workers = [Worker(500, 2) for _ in range(8)]
    one = Simulation(skewed(18, 400, 0), workers, [], 0)
    end = one.run()
    assert one.twice == 0
    assert end < 1.03 * sum(map(sum, one.work)) / 4000 + 1.0
    assert one.handovers <= 40


def test_a_worker_that_has_to_load_its_engine_gets_rows_only_if_the_rest_takes_clearly_longer():
    for seconds, is_used in ((25, False), (30, False), (200, True)):
        one = Simulation([[10.0] * (10 * seconds)], [Worker(100, 2), Worker(100, 2, is_loaded=False)], [], 0)
        # The whole of it is the loaded one's to begin with.
        one.begin("w0", one.todo.pop())
        one.run()
        assert (one.handovers > 0) == is_used, seconds


def test_a_partition_that_lost_an_attempt_is_not_split():
    one = Simulation([[10.0] * 400, [10.0] * 4], [Worker(100, 1), Worker(100, 1)], [], 0)
    while not one.handovers:
        one.tick()
    one.kill(
        next(name for name, worker in one.workers.items() if any(a.taken for a in worker.attempts.values()))
    )
    split = one.handovers
    one.run()
    assert one.handovers == split
    assert one.twice == 0, "what was lost is done again once the other attempt has ended"


@settings(max_examples=60)
@given(
    partitions=st.integers(1, 12),
    rows=st.integers(1, 60),
    workers=st.lists(
        st.tuples(st.sampled_from([100.0, 200.0, 400.0]), st.integers(1, 3)), min_size=1, max_size=4
    ),
    deaths=st.lists(st.floats(0, 30), max_size=6).map(sorted),
    seed=st.integers(0, 1000),
)
def test_whatever_dies_every_row_is_done_and_no_slot_is_taken_twice(partitions, rows, workers, deaths, seed):
    one = Simulation(
        skewed(partitions, rows, seed), [Worker(speed, slots) for speed, slots in workers], deaths, seed
    )
    one.run()
    assert all(len(done) == rows for done in one.staged)
    if not deaths:
        assert one.twice == 0


def test_tokens_of_answers_under_way_are_not_left():
    """Two attempts with the same rows left, one of which is nearly done with those that its engine is at."""
    tail = Tail(lambda index: 10)
    for now in (1.0, 11.0):
        beats = Heartbeats(Counters(rows=20))
        for name, under_way in (("behind", 0.0), ("ahead", 900.0)):
            task = AttemptCounters(
                run="run",
                partition=0,
                task=name,
                doing="generating",
                pulled=10,
                work_done=1000.0,
                work_left=1000.0,
            )
            beats.worker_views.append(WorkerView(name, "host", 1, 2, 0, "generating", None))
            gauges = {"active_output_tokens": under_way}
            beats.engines.append((name, EngineStats(pid=1, load_seconds=20.0, gauges=gauges)))
            beats.activity.append((name, task, 0))
        tail.see(now, beats, {"behind", "ahead"})
    (one,) = tail.handovers(11.0, {"behind": 2, "ahead": 2}, {"behind", "ahead"})
    assert (one.owner, one.taker) == ("behind", "ahead")
