"""A plain model of a run: partitions, workers and their engines, and what the driver sees of them each second.

It knows nothing of how the rest is estimated: rows cost what an engine that is measured would take for them.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchrun.counters import Counters, added
from batchrun.engine.protocol import EngineStats
from batchrun.telemetry.progress import Progress, WorkerView

LOAD = 10.0  # seconds before the first row
POLL = 1.0
BATCH_TOKENS = 16384
ACTIVE = 64  # rows that a paged engine decodes at once
STEPS = 8  # of which it does so many between two looks
IN_FLIGHT_PER_SLOT = 1.25
ON_CPU = "paged on a CPU"

Ints = NDArray[np.int_]


@dataclass
class Rows:
    """Prompt and answer lengths, in the data's order."""

    prompts: Ints
    answers: Ints

    def __post_init__(self) -> None:
        self.limit = int(self.answers.max())


@dataclass
class Task:
    """A partition in a worker's hands: its rows, how many were pulled, and which of those wait in the engine."""

    rows: Ints
    pulled: int = 0
    outstanding: int = 0
    finished: int = 0


@dataclass
class Worker:
    """Its tasks, its engine's queue (of its tasks' rows), and what it has finished since the run began."""

    engine: str
    data: Rows
    slots: int
    noise: Iterator[float]
    window: int
    tasks: list[Task] = field(default_factory=list)
    waiting: deque[tuple[Task, Ints]] = field(default_factory=deque)
    ordered: list[tuple[Task, int]] = field(default_factory=list)
    active: list[tuple[Task, int]] = field(default_factory=list)
    ending: list[tuple[Task, int]] = field(default_factory=list)  # active ones whose last round is not over
    left: Ints = field(default_factory=lambda: np.zeros(0, int))
    done: Counters = field(default_factory=Counters)  # of finished partitions and of those in hand
    pulled: int = 0
    sent: int = 0

    def pull(self) -> None:
        """Every task keeps its share of twice the engine's window outstanding."""
        share = max(1, 2 * self.window // max(1, len(self.tasks)))
        for task in self.tasks:
            new = task.rows[task.pulled : task.pulled + max(0, share - task.outstanding)]
            if len(new):
                task.pulled, task.outstanding = task.pulled + len(new), task.outstanding + len(new)
                self.pulled, self.sent = self.pulled + len(new), self.sent + int(self.data.prompts[new].sum())
                self.waiting.append((task, new))

    def work(self) -> tuple[float, list[tuple[Task, int]]]:
        """Seconds of the next piece of work, and the rows that end with it."""
        return self._batch() if self.engine == "padded" else self._round()

    def _take_window(self, room: int, by_task: bool) -> None:
        while self.waiting and room > 0:
            task, rows = self.waiting.popleft()
            self.ordered += [(task, int(row)) for row in rows[:room]]
            if len(rows) > room:
                self.waiting.appendleft((task, rows[room:]))
            room -= len(rows)
        oldest = {id(task): i if by_task else 0 for i, task in enumerate(self.tasks)}
        self.ordered.sort(key=lambda one: (-oldest[id(one[0])], self.data.prompts[one[1]]))

    def _batch(self) -> tuple[float, list[tuple[Task, int]]]:
        """The longest rows of a window, BATCH_TOKENS padded tokens of them, that all finish at once."""
        if not self.ordered:
            self._take_window(self.window, by_task=False)
        longest = self.data.prompts[self.ordered[-1][1]]
        limit = self.data.limit
        count = max(1, BATCH_TOKENS // (longest + limit))
        batch = [self.ordered.pop() for _ in range(min(count, len(self.ordered)))]
        most = max(self.data.answers[row] for _, row in batch)
        seconds = 1e-4 * len(batch) * longest + most * (5e-3 + 2e-4 * len(batch))
        return seconds * next(self.noise), batch

    def _round(self) -> tuple[float, list[tuple[Task, int]]]:
        """A few steps of all active rows; the longest that wait take the places of those that end."""
        self._take_window(self.window - len(self.ordered), by_task=True) if self.waiting else None
        new = [self.ordered.pop() for _ in range(min(len(self.ordered), ACTIVE - len(self.active)))]
        self.active += new
        self.left = np.concatenate([self.left, self.data.answers[[row for _, row in new]]]) - STEPS
        prefill = sum(self.data.prompts[row] for _, row in new)
        seconds = 1e-5 * prefill + STEPS * (0.02 + 2e-5 * len(self.active))
        if self.engine == ON_CPU:
            seconds = self._round_on_cpu(new)
        ended = [one for one, left in zip(self.active, self.left, strict=True) if left <= 0]
        self.active = [one for one, left in zip(self.active, self.left, strict=True) if left > 0]
        self.left = self.left[self.left > 0]
        self.ending = ended
        return seconds * next(self.noise), ended

    def _round_on_cpu(self, new: list[tuple[Task, int]]) -> float:
        """Every token costs what its weights do and as much as it has to attend to: steps of few rows are short."""
        first = self.data.prompts[[row for _, row in new]].astype(float)
        rows = [row for _, row in self.active]
        context = self.data.prompts[rows] + self.data.answers[rows] - self.left
        prefill = (1e-4 * first + 1e-7 * first**2).sum()
        return float(prefill + STEPS * (0.002 + (1e-4 + 5e-7 * context).sum()))

    def finish(self, ended: list[tuple[Task, int]]) -> None:
        self.ending = []
        for task, row in ended:
            task.outstanding, task.finished = task.outstanding - 1, task.finished + 1
            self.done.rows += 1
            self.done.prompt_tokens += int(self.data.prompts[row])
            self.done.output_tokens += int(self.data.answers[row])
            reason = "length" if self.data.answers[row] == self.data.limit else "stop"
            self.done.finish_reasons = added(self.done.finish_reasons, {reason: 1})

    def view(self, number: int) -> WorkerView:
        rows = [row for _, row in self.active + self.ending]
        gauges = {
            "active_rows": len(rows),
            "active_prompt_tokens": int(self.data.prompts[rows].sum()),
            "active_output_tokens": int(self.data.answers[rows].sum() - self.left.sum()),
        }
        finished = [task.rows[: task.pulled] for task in self.tasks]
        in_hand = Counters(
            rows=sum(task.finished for task in self.tasks),
            pulled=sum(task.pulled for task in self.tasks),
            sent_tokens=int(sum(self.data.prompts[rows].sum() for rows in finished)),
        )
        in_hand.prompt_tokens = in_hand.sent_tokens - self._outstanding_tokens()
        if self.engine == "padded":
            gauges = {}
        address, doing = f"10.0.0.{number}", "generating" if self.tasks else "idle"
        device = "cpu" if self.engine == ON_CPU else ""
        stats = EngineStats(
            engine=self.engine, device=device, pid=1, completions=self.done.rows, gauges=gauges
        )
        rows_in_hand = sum(len(task.rows) for task in self.tasks)
        place = f"tcp://{address}:9000", address, len(self.tasks), self.slots, 0
        return WorkerView(*place, doing, stats, rows=rows_in_hand, counts=in_hand)

    def _outstanding_tokens(self) -> int:
        rows = [row for _, row in self.active + self.ending + self.ordered] + [
            r for _, rows in self.waiting for r in rows
        ]
        return int(self.data.prompts[rows].sum())


def simulate(
    data: Rows, partitions: int, workers: int = 1, slots: int = 2, engine: str = "padded", *,
    window: int = 8192, seed: int = 0,
) -> list[Progress]:  # fmt: skip
    """What the driver sees of the run each second, the last time at its end."""
    random = np.random.default_rng(seed)
    noise = iter(lambda: float(random.lognormal(0, 0.05)), None)
    fleet = [Worker(engine, data, slots, noise, window) for _ in range(workers)]
    todo = deque(np.array_split(np.arange(len(data.prompts)), partitions))
    seen: list[Progress] = []
    events: list[tuple[float, int, list[tuple[Task, int]]]] = []
    busy = 0.0

    def begin(number: int, now: float) -> None:
        worker = fleet[number]
        worker.tasks = [task for task in worker.tasks if task.finished < len(task.rows)]
        while todo and len(worker.tasks) < slots:
            worker.tasks.append(Task(todo.popleft()))
        worker.pull()
        if worker.tasks:
            seconds, ended = worker.work()
            heapq.heappush(events, (now + seconds, number, ended))

    def look(now: float) -> None:
        counts = sum((worker.done for worker in fleet), Counters())
        counts.pulled, counts.sent_tokens = sum(w.pulled for w in fleet), sum(w.sent for w in fleet)
        in_flight = sum(len(worker.tasks) for worker in fleet)
        seen.append(
            Progress(
                seconds=now, partitions=partitions, partitions_done=partitions - len(todo) - in_flight,
                partitions_in_flight=in_flight, rows=len(data.prompts), rows_done=counts.rows, counts=counts,
                workers=workers,
                worker_time={"loading": LOAD * workers, "generating": busy, "idle": (now - LOAD) * workers - busy},
                worker_views=[worker.view(number) for number, worker in enumerate(fleet)],
            )
        )  # fmt: skip

    for round_of_tasks in range(slots):  # an idle worker gets a task before a busy one a second
        for worker in fleet:
            if todo and len(worker.tasks) == round_of_tasks:
                worker.tasks.append(Task(todo.popleft()))
    for number in range(workers):
        begin(number, LOAD)
    now = LOAD
    while events:
        when = events[0][0]
        while now + POLL < when:
            now += POLL
            busy += POLL * sum(bool(worker.tasks) for worker in fleet)
            look(now)
        when, number, ended = heapq.heappop(events)
        fleet[number].finish(ended)
        begin(number, when)
    look(when)
    return seen
