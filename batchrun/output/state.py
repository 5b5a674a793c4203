"""How far a plan has come, from one listing of its output."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchrun.errors import OutputError
from batchrun.output.layout import DATA, RETRIES, STAGE, Layout
from batchrun.storage import Folder


@dataclass(frozen=True, slots=True)
class State:
    """Per partition (arrays by its index): bytes of its part and bytes staged for it; 0 where there are none.

    `foreign` are the keys in data/ that are no parts of this plan, `retries` how many retries were begun.
    """

    part_bytes: NDArray[np.int64]
    staged_bytes: NDArray[np.int64]
    foreign: list[str]
    retries: int = 0

    @property
    def committed(self) -> NDArray[np.bool_]:
        """(partitions,) Whether the part is there."""
        return self.part_bytes > 0

    @property
    def streaming(self) -> NDArray[np.bool_]:
        """(partitions,) Whether rows are staged and no part is there."""
        return (self.staged_bytes > 0) & ~self.committed

    @property
    def planned(self) -> NDArray[np.bool_]:
        """Partitions that nothing is there of yet."""
        return ~(self.committed | self.streaming)

    @property
    def complete(self) -> bool:
        """Whether every part is there."""
        return bool(self.committed.all())

    def refuse_foreign(self, folder: Folder) -> None:
        """Raises OutputError, naming files in data/ that readers would take for answers of this plan."""
        if not self.foreign:
            return
        more = f" and {len(self.foreign) - 5:,} more" if len(self.foreign) > 5 else ""
        what = f"data/ holds what is not of this job: {', '.join(self.foreign[:5])}{more}"
        raise OutputError(what, folder.name, "give output.path an empty folder, or move it away")


def scan(folder: Folder, layout: Layout) -> State:
    """One listing of the whole output; cheap at 100,000 partitions."""
    part_bytes = np.zeros(layout.partitions, dtype=np.int64)
    staged_bytes = np.zeros(layout.partitions, dtype=np.int64)
    foreign: list[str] = []
    retries = 0
    for key, size in folder.list().items():
        if key.startswith(DATA):
            partition = layout.partition_of_part(key)
            if partition is None:
                foreign.append(key)
            else:
                part_bytes[partition] = size
        elif key.startswith(STAGE) and (partition := layout.partition_of_chunk(key)) is not None:
            staged_bytes[partition] += size
        elif key.startswith(RETRIES):
            retries += 1
    return State(part_bytes, staged_bytes, sorted(foreign), retries)
