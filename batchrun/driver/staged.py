"""What is safe of a run that ends before it is complete, also where no receipt tells of it."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from batchrun.dataset.plan import Plan
from batchrun.errors import BatchrunError
from batchrun.output.layout import STAGE
from batchrun.storage import Folder, deadline
from batchrun.worker.order import WorkOrder

# Seconds to look at the store for it, and those after a stop from which on nobody waits for that any more.
LOOK_SECONDS, LATEST = 1.0, 3.5


@dataclass
class Unheard:
    """Partitions that the store tells of and no receipt did, since their workers left, or no task came to them: the
    rows `staged`, by partition, and the partitions `committed`. `complete` if all of them were looked at in time."""

    staged: dict[int, int] = field(default_factory=dict)
    committed: set[int] = field(default_factory=set)
    complete: bool = False

    def told(
        self, plan: Plan, work: Mapping[int, int], rows: int, parts: int, staged: Mapping[int, int]
    ) -> str:
        """For people: these together with the `rows` in `parts` and those staged that receipts tell of."""
        rows += sum(work[index] for index in self.committed)
        more = sum({**staged, **self.staged}.values())
        least = "" if self.complete else "at least "
        return (
            f"{least}{rows + more:,} of {plan.rows:,} rows are safe: {rows:,} in "
            f"{parts + len(self.committed):,} of {len(plan.partitions):,} parts, {more:,} staged"
        )


def unheard(
    order: WorkOrder, plan: Plan, folder: Folder, partitions: Collection[int], began: float
) -> Unheard:
    """Looks at what is staged of these partitions, for a second, or less where much time has gone by since `began`."""
    found = Unheard()

    def look() -> None:
        named = {order.layout.partition_of_chunk(key) for key in folder.list(STAGE)}
        for index in sorted(one for one in named if one is not None and one in partitions):
            attempt = order.attempt(plan.partitions[index])
            if attempt.open():
                found.committed.add(index)
            else:
                found.staged[index] = attempt.restored

    seconds = min(LOOK_SECONDS, began + LATEST - time.monotonic())
    if seconds <= 0:
        return found
    try:
        deadline.within(seconds, look, at_stop=seconds)
    except (BatchrunError, OSError):
        # It may go on in its thread: what it has found by now.
        return Unheard(dict(found.staged), set(found.committed))
    return Unheard(found.staged, found.committed, complete=True)
