"""Where everything of an output lies. Keys are relative to the output folder."""

from __future__ import annotations

import re
from dataclasses import dataclass

DATA = "data/"
JOB_FOLDER = "_job/"
STAGE = "_job/stage/"
TEMPORARY = "_job/tmp/"
JOB = "_job/job.json"
PLAN = "_job/plan.parquet"
MANIFEST = "_job/manifest.json"
LEASE = "_job/lease.json"
PARTIAL = ".partial"

_PART = re.compile(r"data/part-(\d{5,})-([0-9a-f]{8})\.parquet")
_CHUNK = re.compile(r"_job/stage/(\d{5,})/\d+-[^/]+-\d+\.(?:chunk|partial)")


@dataclass(frozen=True, slots=True)
class Layout:
    """The keys of one plan: its hash (hex) and how many partitions it has."""

    plan_hash: str
    partitions: int

    @property
    def digits(self) -> int:
        return max(5, len(str(self.partitions - 1)))

    def part(self, partition: int) -> str:
        return f"{DATA}part-{partition:0{self.digits}d}-{self.plan_hash[:8]}.parquet"

    def stage(self, partition: int) -> str:
        """The prefix of the partition's chunks."""
        return f"{STAGE}{partition:0{self.digits}d}/"

    def chunk(self, partition: int, first_row: int, attempt_id: str, number: int) -> str:
        return f"{self.stage(partition)}{first_row}-{attempt_id}-{number}.chunk"

    def partial(self, partition: int, first_row: int, attempt_id: str, number: int) -> str:
        """A chunk of rows that are not finished yet."""
        return f"{self.stage(partition)}{first_row}-{attempt_id}-{number}{PARTIAL}"

    def partition_of_part(self, key: str) -> int | None:
        """Which partition's part the key is; None where it is none of this plan."""
        match = _PART.fullmatch(key)
        if match is None or match[2] != self.plan_hash[:8]:
            return None
        return self._known(match[1])

    def partition_of_chunk(self, key: str) -> int | None:
        match = _CHUNK.fullmatch(key)
        return None if match is None else self._known(match[1])

    def _known(self, digits: str) -> int | None:
        partition = int(digits)
        return partition if len(digits) == self.digits and partition < self.partitions else None


def is_part(key: str) -> bool:
    """Whether the key is a part of any plan."""
    return _PART.fullmatch(key) is not None
