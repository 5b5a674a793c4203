"""Where everything of an output lies. Keys are relative to the output folder."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from batchrun.hashing import stable_hash

DATA = "data/"
JOB_FOLDER = "_job/"
STAGE = "_job/stage/"
TEMPORARY = "_job/tmp/"
JOB = "_job/job.json"
PLANS = "_job/plans/"
RETRIES = "_job/retries/"
MANIFEST = "_job/manifest.json"
LEASE = "_job/lease.json"
PARTIAL = ".partial"

_PART = re.compile(r"data/(?:[^/]+=[^/]*/)*part-(\d{5,})-([0-9a-f]{8})\.parquet")
_CHUNK = re.compile(r"_job/stage/(\d{5,})-([0-9a-f]{8})(?:-r(\d+))?/\d+-[^/]+-\d+\.(?:chunk|partial)")


@dataclass(frozen=True)
class Layout:
    """The keys of one output: the hash (hex) of what it is made of, and how many partitions it has.

    An output that grew has several `plans`, (hash, partitions) each: its partitions are numbered through, and each
    key carries the hash of its own plan. `folders` are those of the parts below data/ (`day=2026-01-01/`), each with
    the first partition that is in it. `generation` is that of the staged rows: 0 of runs, n of the n-th retry,
    which never takes up what another one staged.
    """

    plan_hash: str
    partitions: int
    plans: tuple[tuple[str, int], ...] = ()
    generation: int = 0
    folders: tuple[tuple[int, str], ...] = ()

    @classmethod
    def of(cls, plans: Sequence[tuple[str, int]], folders: tuple[tuple[int, str], ...] = ()) -> Layout:
        """The layout of plans, (hash, partitions) each, in the order in which they were made."""
        if len(plans) == 1:
            return cls(*plans[0], folders=folders)
        together, count = stable_hash([plan for plan, _ in plans]), sum(count for _, count in plans)
        return cls(together, count, tuple(plans), folders=folders)

    def hash_of(self, partition: int) -> str:
        """The hash of the plan that the partition belongs to."""
        return self._plan(partition)[0]

    def part(self, partition: int) -> str:
        """The key of the partition's part."""
        return f"{DATA}{self._folder(partition)}part-{self._name(partition)}.parquet"

    def stage(self, partition: int) -> str:
        """The prefix of the partition's chunks."""
        retry = f"-r{self.generation}" if self.generation else ""
        return f"{STAGE}{self._name(partition)}{retry}/"

    def chunk(self, partition: int, first_row: int, attempt_id: str, number: int) -> str:
        """A key for rows that the attempt stages, the `number`-th time; `first_row` is the lowest of them."""
        return f"{self.stage(partition)}{first_row}-{attempt_id}-{number}.chunk"

    def partial(self, partition: int, first_row: int, attempt_id: str, number: int) -> str:
        """A chunk of rows that are not finished yet."""
        return f"{self.stage(partition)}{first_row}-{attempt_id}-{number}{PARTIAL}"

    def partition_of_part(self, key: str) -> int | None:
        """Which partition's part the key is; None where it is none of this output."""
        match = _PART.fullmatch(key)
        partition = None if match is None else self._known(match[1], match[2])
        return None if partition is None or self.part(partition) != key else partition

    def partition_named(self, name: str) -> int | None:
        """Which partition's part has this name, whatever folder it is in; None where none of this output has."""
        match = _PART.fullmatch(f"{DATA}{name}")
        return None if match is None or "/" in name else self._known(match[1], match[2])

    def partition_of_chunk(self, key: str) -> int | None:
        """Which partition's chunk of this generation the key is, None where it is none."""
        match = _CHUNK.fullmatch(key)
        if match is None or int(match[3] or 0) != self.generation:
            return None
        return self._known(match[1], match[2])

    def partition_of_any_chunk(self, key: str) -> int | None:
        """The same for chunks of every generation."""
        match = _CHUNK.fullmatch(key)
        return None if match is None else self._known(match[1], match[2])

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(count for _, count in self.plans or ((self.plan_hash, self.partitions),)))

    def _plan(self, partition: int) -> tuple[str, int]:
        """The partition's plan, and how many digits the numbers of that plan's partitions have."""
        plans = self.plans or ((self.plan_hash, self.partitions),)
        place = bisect_right(self._ends, partition)
        # By the plan's own end, so that no key changes when another plan follows.
        return plans[place][0], max(5, len(str(self._ends[place] - 1)))

    def _folder(self, partition: int) -> str:
        place = bisect_right(self.folders, partition, key=lambda run: run[0])
        return self.folders[place - 1][1] if place else ""

    def _name(self, partition: int) -> str:
        plan_hash, digits = self._plan(partition)
        return f"{partition:0{digits}d}-{plan_hash[:8]}"

    def _known(self, digits: str, plan_hash: str) -> int | None:
        partition = int(digits)
        if partition >= self.partitions or self._name(partition) != f"{digits}-{plan_hash}":
            return None
        return partition


def plan_key(number: int) -> str:
    """The key of the plan of this number, from 0 on."""
    return f"{PLANS}{number:05d}.parquet"


def retry_key(number: int) -> str:
    """The key of what the retry of this number was begun with, from 1 on."""
    return f"{RETRIES}{number:05d}.json"


def retry_of_chunk(key: str) -> int | None:
    """The number of the retry that staged the chunk, 0 where a run did; None where the key is no chunk."""
    match = _CHUNK.fullmatch(key)
    return None if match is None else int(match[3] or 0)
