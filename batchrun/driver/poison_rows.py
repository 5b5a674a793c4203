"""Which rows kill their engine or worker: judged by what attempts leave in storage, found by bisecting.

Pure logic; the driver runs the attempts. A partition whose attempts were lost STRIKES times in a row, none of them
leaving anything new behind, is a suspect. It waits until nothing else is in flight and is then tried alone, each time
on a worker that has just shown that it can load the engine: first all its missing rows, then halves of them, down to
a row that was lost alone STRIKES times. That row is condemned; all others are durable by then. An engine that fails
whatever row it gets is no row's fault: `worker/engine_health.py` finds that.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

from batchrun.errors import BatchrunError, TooManyFaults

# Lost attempts without progress: of a partition, of a row alone, of a worker that loads no engine.
STRIKES = 3
# Lost attempts in a row, anywhere in the run, that left nothing behind.
HOPELESS = 16
# Rows in one run: each costs a dozen starts of the engine, so more are no single rows' fault.
MAX_POISON_ROWS = 20


class Bisection:
    """A partition under suspicion: sets of its rows still to be tried, and the rows that are found guilty.

    Sets are halved breadth first, so that a sound half finishes before the guilty one is cut again. A guilty row
    costs at most ceil(log2(missing rows)) + STRIKES lost attempts.
    """

    def __init__(self) -> None:
        self.poison_rows: list[int] = []
        self._waiting: deque[list[int]] | None = None
        self._losses = 0

    def next_rows(self, missing: Collection[int]) -> list[int]:
        """The rows to try next, of those that are `missing` in storage; empty when each is durable or condemned."""
        if self._waiting is None:
            self._waiting = deque([sorted(missing)])
        left = set(missing)
        while self._waiting:
            if rows := [row for row in self._waiting[0] if row in left]:
                self._waiting[0] = rows
                return rows
            self._waiting.popleft()
            self._losses = 0
        return []

    def lost(self) -> None:
        """The attempt at the last trial's rows was lost."""
        if not self._waiting:
            return
        rows = self._waiting[0]
        if len(rows) > 1:
            middle = len(rows) // 2
            self._waiting.popleft()
            self._waiting.extend((rows[:middle], rows[middle:]))
            return
        self._losses += 1
        if self._losses == STRIKES:
            self.poison_rows += self._waiting.popleft()
            self._losses = 0


class PoisonRowSearch:
    """The judge of a run's lost attempts.

    A row is only ever blamed for what happened while it was alone on a worker that had loaded the engine; an engine
    that cannot be loaded is its machine's fault. However an attempt was lost, it counts alike: a dead engine, a dead
    worker, an exception.
    """

    def __init__(self) -> None:
        self.open: dict[int, Bisection] = {}
        self._strikes: dict[int, int] = {}
        self._missing: dict[int, int] = {}
        self._unloaded: dict[str, int] = {}
        self._lost_in_a_row = 0

    def progress(self, partition: int) -> None:
        """Something new of the partition is durable."""
        self._strikes.pop(partition, None)
        self._unloaded.clear()
        self._lost_in_a_row = 0

    def unloaded(self, worker: str, workers: Collection[str], reason: str) -> None:
        """A worker could not load its engine, or not even try.

        Raises:
            BatchrunError: none of the present `workers` can, and nothing else goes on.
        """
        self._unloaded[worker] = self._unloaded.get(worker, 0) + 1
        # A worker that dies comes back under another name.
        if sum(self._unloaded.values()) >= STRIKES * max(1, len(workers)):
            raise BatchrunError(
                f"no worker could load its engine, {sum(self._unloaded.values())} times in a row, last with {reason}",
                fix="look at the machine, its memory and the engine's message: no row is to blame",
            )

    def lost(self, partition: int, reason: str, in_flight: int) -> bool:
        """A normal attempt was lost without progress; whether its partition is a suspect from now on.

        `in_flight` is how many attempts one blow may have taken.

        Raises:
            TooManyFaults: nothing in the run gets done any more.
        """
        self._count(reason, max(HOPELESS, STRIKES * in_flight))
        self._strikes[partition] = self._strikes.get(partition, 0) + 1
        if self._strikes[partition] < STRIKES:
            return False
        del self._strikes[partition]
        self.open[partition] = Bisection()
        return True

    def next_rows(self, partition: int, missing: Collection[int]) -> list[int]:
        """The rows of an open suspect to be tried next, alone; empty when all that is left is to seal it."""
        if len(missing) < self._missing.get(partition, len(missing)):
            self.progress(partition)
        self._missing[partition] = len(missing)
        return self.open[partition].next_rows(missing)

    def lost_alone(self, partition: int, isolated: Collection[int], reason: str) -> None:
        """An attempt at an open suspect was lost; `isolated` is what `next_rows` gave for it.

        Raises:
            TooManyFaults: nothing gets done any more, or more rows are condemned than can be rows' fault.
            BatchrunError: each row was tried, and still the partition is lost.
        """
        self._count(reason, HOPELESS)
        if not isolated:
            self._strikes[partition] = self._strikes.get(partition, 0) + 1
            if self._strikes[partition] >= STRIKES:
                raise BatchrunError(
                    f"partition {partition} is lost again and again though each of its rows was tried, "
                    f"last with {reason}",
                    fix="its part cannot be written: look at the workers' memory and logs",
                )
            return
        self.open[partition].lost()
        poison_rows = [(i, row) for i, search in self.open.items() for row in search.poison_rows]
        if len(poison_rows) > MAX_POISON_ROWS:
            examples = ", ".join(f"partition {i} row {row}" for i, row in poison_rows[:3])
            raise TooManyFaults(
                f"{len(poison_rows)} rows killed their engine or worker, each of them alone ({examples}, ...), "
                f"last with {reason}",
                fix="look at the engine, its kernels and the driver; the same command goes on with the rest",
            )

    def _count(self, reason: str, most: int) -> None:
        self._lost_in_a_row += 1
        if self._lost_in_a_row > most:
            raise TooManyFaults(
                f"{self._lost_in_a_row} attempts in a row were lost without a finished row; the last one: {reason}",
                fix="look at the engine's message; the same command tries again",
            )
