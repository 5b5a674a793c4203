"""The partitions of one run: which are left to begin with, what is staged of them, and which parts are committed."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable, Mapping

from batchrun.dataset.plan import Plan
from batchrun.output.attempt import Receipt

# Seconds that one task may take with several partitions: it costs the driver 5 ms whatever is in it.
TASK_SECONDS = 1.0


class Partitions:
    """Those that a run has to do, and what has become of them.

    `work` is how many rows of which are to be generated, `todo` those that no attempt is at, `staged` the rows of those
    whose tasks ended before they were covered. `receipts` are of parts that this run saw committed, and
    `rows_committed` the rows of all parts, those of earlier runs too.
    """

    def __init__(self, plan: Plan, work: Mapping[int, int]) -> None:
        self.work = work
        self.todo = deque(work)
        self.staged: dict[int, int] = {}
        self.receipts: dict[int, Receipt] = {}
        self.rows_committed = plan.rows - sum(work.values())
        self._plan = plan
        # Those that share no task any more: one that they shared was lost.
        self._single: set[int] = set()
        # Seconds that one takes, as of late.
        self._pace = math.inf

    @property
    def parts(self) -> int:
        """How many parts the output has, those of earlier runs included."""
        return len(self._plan.partitions) - len(self.work) + len(self.receipts)

    @property
    def untold(self) -> set[int]:
        """Those that no receipt has told anything of."""
        return self.work.keys() - self.receipts.keys() - self.staged.keys()

    def rows(self, partitions: Iterable[int]) -> dict[int, int]:
        """How many each of the partitions has."""
        return {index: self._plan.partitions[index].rows for index in partitions}

    def take(self, window: int) -> list[int]:
        """Those of the next task, out of `todo`: one as a rule, several tiny ones, fewer of these again once little
        more than `window` tasks are left."""
        members = [self.todo.popleft()]
        size = min(TASK_SECONDS / self._pace, len(self.todo) / (2 * window))
        while len(members) < size and not self._single.intersection((members[0], self.todo[0])):
            members.append(self.todo.popleft())
        for index in members:
            self.staged.pop(index, None)
        return members

    def put_back(self, members: Iterable[int], others: Collection[int]) -> None:
        """Attempts at `members` ended without a part: they are to do again, but for committed ones, and for `others`,
        of which another attempt's end decides."""
        self.todo.extend(index for index in members if index not in others and index not in self.receipts)

    def keep_single(self, members: Iterable[int]) -> None:
        """They get tasks of their own from now on."""
        self._single.update(members)

    def stage(self, index: int, rows: int) -> None:
        """So many more rows of it are staged."""
        self.staged[index] = self.staged.get(index, 0) + rows

    def commit(self, index: int, part: Receipt, seconds: float) -> bool:
        """Its part is there, after an attempt of so many seconds; False where that was known, since of several attempts
        that shared it more than one has seen it covered."""
        self.staged.pop(index, None)
        if index in self.receipts:
            return False
        self.receipts[index] = part
        self.rows_committed += self.work[index]
        known = math.isfinite(self._pace)
        self._pace = (self._pace + seconds) / 2 if known else seconds
        return True
