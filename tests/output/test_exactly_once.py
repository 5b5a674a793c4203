"""The invariants of the output, under every interleaving, crash and fault that a search finds."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from interleaving import Actor, Interleaving, OneThread
from numpy.typing import NDArray
from parts import JOB_HASH, SCHEMA, answers, attempt, carried, faulty_folder, layout, output, pin

from batchrun.errors import BatchrunError
from batchrun.output import chunk, clean, manifest, state
from batchrun.output.attempt import Attempt, PartialAnswer
from batchrun.output.chunk import BadChunk, Origin
from batchrun.output.identity import Identity
from batchrun.output.layout import MANIFEST, STAGE
from batchrun.output.samples import repeated
from batchrun.storage import folder

VERDICTS = st.sampled_from(
    [None] * 5 + ["crash", "crash after", "crash within", "reset", "lost", "busy", "truncate"] + ["stale"] * 3
)

# What it does, at which partition, and how many rows it stages and generates at once.
ACTORS = st.tuples(
    st.sampled_from(["attempt", "leaver", "leaver", "sharer", "sharer", "sharer", "run", "run", "clean"]),
    st.integers(0, 2),
    st.integers(1, 4),
    st.integers(1, 3),
)


def tokens(partition: int, row: int, length: int) -> NDArray[np.int32]:
    """The first tokens of this row's answer."""
    return np.arange(length, dtype=np.int32) + 1000 * partition + 10 * row


class ExactlyOnce(Interleaving):
    # Answers of each row, in lists or in rows of the output.
    samples, each = 1, 1

    @initialize(
        rows=st.lists(st.integers(0, 6), min_size=1, max_size=3),
        actors=st.lists(ACTORS, min_size=2, max_size=4),
        conditional=st.booleans(),
    )
    def start(self, rows: list[int], actors: list[tuple[str, int, int, int]], conditional: bool) -> None:
        self.rows = rows
        self.plan = layout(len(rows))
        self.folder, self.store = faulty_folder()
        self.store.conditional = conditional
        self.store.gate = self.gate
        self.store.after = self.observe
        self.root = self.folder.url.removeprefix("faulty://")
        self.actors: list[Actor] = []
        self.started = 0
        self.checked: dict[str, bytes] = {}
        self.covered: dict[int, set[int]] = {i: set() for i in range(len(rows))}
        self.failures: list[str] = []
        for actor in actors:
            self.start_one(*actor)

    # What an actor does

    def one_attempt(
        self,
        actor: Actor,
        partition: int,
        who: str,
        flush_rows: int,
        step: int,
        leaves: bool = False,
        is_mine: Callable[[int], bool] | None = None,
    ) -> None:
        """With `is_mine`, it shares the partition: other rows are others' to generate."""
        rows = self.rows[partition]
        one = attempt(
            self.folder,
            self.plan,
            partition,
            rows,
            who,
            samples=self.samples,
            each=self.each,
            flush_rows=flush_rows,
        )
        actor.listed.pop(partition, None)
        actor.begun.pop(partition, None)
        if one.open() is not None:
            return
        missing = one.missing[::-1]
        again = actor.listed[partition] & set(missing.tolist())
        if again:
            self.failures.append(f"{who} generates {again} of {partition} again")
        self.check_begun(one, actor.begun[partition])
        if is_mine is not None:
            missing = np.array([row for row in missing if is_mine(row)], np.int64)
        for start in range(0, len(missing), step):
            some = missing[start : start + step]
            numbers = (some[:, None] * self.each + np.arange(self.each)).ravel()
            one.add(repeated(answers(partition, numbers, who), self.samples))
            one.maybe_flush()
            if leaves and start + step < len(missing):
                one.flush()
                one.keep(
                    {
                        number: PartialAnswer(3, tokens(partition, number, step + row % 2))
                        for row in missing[start + step :].tolist()
                        for number in [row * self.samples * self.each]
                    }
                )
                return
        if not one.covered:
            one.flush()
            if one.open() is not None or not one.covered:
                return
        one.seal(carried(partition, rows), SCHEMA)

    def check_begun(self, one: Attempt, staged: dict[int, int]) -> None:
        """What an attempt takes up of begun answers is theirs, and no less than was staged when it listed."""
        for row, begun in one.begun.items():
            if begun.tokens.tolist() != tokens(one.partition, row, len(begun.tokens)).tolist():
                self.failures.append(f"row {row} of {one.partition} goes on from another's tokens")
        taken = {row: len(begun.tokens) for row, begun in one.begun.items()}
        short = {row for row, length in staged.items() if length > taken.get(row, 0)}
        if short and self.store.counts()["delete"] == 0:
            self.failures.append(f"begun answers of {short} in {one.partition} were lost")

    def one_run(self, actor: Actor, who: str, flush_rows: int, step: int) -> None:
        pin(self.folder, Identity(self.plan.plan_hash, JOB_HASH, {"a": 1}, "model", "0", created="now"))
        committed = state.scan(self.folder, self.plan).committed
        for partition in range(len(self.rows)):
            if not committed[partition]:
                self.one_attempt(actor, partition, f"{who}.{partition}", flush_rows, step)
        manifest.write(output(self.folder, self.plan, self.rows, each=self.each))

    # The search

    @rule(actor=ACTORS)
    def start_actor(self, actor: tuple[str, int, int, int]) -> None:
        if sum(not one.done for one in self.actors) < 4:
            self.start_one(*actor)

    def start_one(self, kind: str, partition: int, flush_rows: int, step: int) -> None:
        who, some = self.name(), partition % len(self.rows)
        work: dict[str, Callable[[Actor], object]] = {
            "attempt": lambda actor: self.one_attempt(actor, some, who, flush_rows, step),
            "leaver": lambda actor: self.one_attempt(actor, some, who, flush_rows, step, leaves=True),
            "sharer": lambda actor: self.one_attempt(
                actor, some, who, flush_rows, step, is_mine=self.share()
            ),
            "run": lambda actor: self.one_run(actor, who, flush_rows, step),
            "clean": lambda actor: clean.delete(self.folder, clean.leftovers(output(self.folder, self.plan))),
        }
        self.spawn(work[kind])

    def share(self) -> Callable[[int], bool]:
        """Of those that share a partition each has other rows; some rows are two's."""
        first = self.started % 2
        return lambda row: row % 2 == first or row % 3 == 0

    @rule(which=st.integers(0, 3), requests=st.integers(1, 6), verdict=VERDICTS)
    def go_on(self, which: int, requests: int, verdict: str | None) -> None:
        self.let_go_on(which, requests, verdict)

    def name(self) -> str:
        self.started += 1
        return f"a{self.started}"

    # What must hold

    def observe(self, operation: str, key: str, result: Any) -> None:
        """Right after a request took effect, before anybody else's next one."""
        actor = self.me()
        key = key.removeprefix(f"{self.root}/")
        if operation == "info":
            actor.seen.add(key)
        if operation == "find":
            actor.seen.update(name.removeprefix(f"{self.root}/") for name in result)
            for partition in range(len(self.rows)):
                if key.rstrip("/") == self.plan.stage(partition).rstrip("/"):
                    actor.listed.setdefault(partition, self.staged(partition, result))
                    actor.begun.setdefault(partition, self.begun(partition, result))
        if operation == "delete" and (partition := self.plan.partition_of_chunk(key)) is not None:
            part = self.plan.part(partition)
            if part not in actor.seen or f"{self.root}/{part}" not in self.store.objects:
                self.failures.append(f"{key} deleted before its part was seen")

    def staged(self, partition: int, keys: Collection[str] | None = None) -> set[int]:
        """Rows that are durable in whole chunks, or in those of them that `keys` names."""
        rows: set[int] = set()
        decode = partial(chunk.decode, schema=chunk.answers_schema((), self.samples))
        for table in self.chunks(partition, ".chunk", decode, keys):
            numbers = table["row"].to_pylist()
            rows.update(number // self.each for number in numbers)
            assert len(numbers) == self.each * len({number // self.each for number in numbers})
        return rows

    def begun(self, partition: int, keys: Collection[str]) -> dict[int, int]:
        """How many tokens of each row are durable in whole chunks of begun answers."""
        lengths: dict[int, int] = {}
        for table in self.chunks(partition, ".partial", chunk.decode_partial, keys):
            for row, own in zip(table["row"].to_pylist(), table["tokens"].to_pylist(), strict=True):
                lengths[row] = max(lengths.get(row, 0), len(own))
        return lengths

    def chunks(
        self, partition: int, suffix: str, decode: Callable[..., pa.Table], keys: Collection[str] | None
    ) -> Iterator[pa.Table]:
        for key, data in self.store.objects.items():
            if (
                f"/{self.plan.stage(partition)}" in key
                and key.endswith(suffix)
                and (keys is None or key in keys)
            ):
                try:
                    origin = Origin(self.plan.plan_hash, JOB_HASH, partition)
                    # The number of a begun answer is row * samples + sample.
                    numbers = self.rows[partition] * (self.samples if suffix == ".partial" else 1) * self.each
                    yield decode(data, origin, numbers)
                except BadChunk:
                    continue

    @invariant()
    def parts_are_whole_and_of_the_plan(self) -> None:
        if not hasattr(self, "store"):
            return
        keys = {f"{self.root}/{self.plan.part(i)}": i for i in range(len(self.rows))}
        for key, data in self.store.objects.items():
            if "/data/" not in key or self.checked.get(key) is data:
                continue
            assert key in keys
            self.check_part(keys[key], data)
            self.checked[key] = data

    def check_part(self, partition: int, data: bytes) -> None:
        table = pq.read_table(pa.BufferReader(data))
        rows = self.rows[partition]
        ids = [f"{partition}/{row}" for row in range(rows)]
        found = table["answer"].to_pylist()
        if self.each > 1:
            assert table["id"].to_pylist() == [one for one in ids for _ in range(self.each)]
            assert table["sample"].to_pylist() == [*range(self.each)] * rows
            assert [own.split(" ")[0] for own in found] == [f"{partition}/{i}" for i in range(len(found))]
            return
        assert table["id"].to_pylist() == ids
        if self.samples > 1:
            assert all(len(own) == self.samples == len({*own}) + self.samples - 1 for own in found)
            found = [own[0] for own in found]
        assert [answer.split(" ")[0] for answer in found] == table["id"].to_pylist()

    @invariant()
    def durable_coverage_never_shrinks(self) -> None:
        if not hasattr(self, "store"):
            return
        for partition, before in self.covered.items():
            there = f"{self.root}/{self.plan.part(partition)}" in self.store.objects
            now = set(range(self.rows[partition])) if there else self.staged(partition)
            assert before <= now
            self.covered[partition] = now

    @invariant()
    def a_manifest_means_that_all_parts_are_there(self) -> None:
        if hasattr(self, "store") and f"{self.root}/{MANIFEST}" in self.store.objects:
            for partition in range(len(self.rows)):
                assert f"{self.root}/{self.plan.part(partition)}" in self.store.objects

    @invariant()
    def nobody_misbehaved(self) -> None:
        if not hasattr(self, "store"):
            return
        assert not self.failures
        for actor in self.actors:
            assert actor.error is None or isinstance(actor.error, BatchrunError), repr(actor.error)

    def teardown(self) -> None:
        if not hasattr(self, "store"):
            return
        self.crash_all()
        self.spawn(lambda actor: self.one_run(actor, self.name(), 2, 2))
        self.actors[-1].finish()
        assert self.actors[-1].error is None
        self.parts_are_whole_and_of_the_plan()
        assert len(self.checked) == len(self.rows)
        self.a_repeated_run_writes_nothing()
        self.spawn(lambda actor: clean.delete(self.folder, clean.leftovers(output(self.folder, self.plan))))
        self.actors[-1].finish()
        assert not [key for key in self.store.objects if STAGE in key], (
            "no chunk of any kind outlives a clean"
        )

    def a_repeated_run_writes_nothing(self) -> None:
        objects = dict(self.store.objects)
        first = len(self.store.requests)
        self.spawn(lambda actor: self.one_run(actor, self.name(), 2, 2))
        self.actors[-1].finish()
        assert self.actors[-1].error is None
        assert {operation for operation, _ in self.store.requests[first:]} <= {"find", "info", "read"}
        assert self.store.objects == objects
        told = json.loads(objects[f"{self.root}/{MANIFEST}"])
        assert told["rows"] == sum(self.rows) * self.each
        assert told["input_rows"] == (sum(self.rows) if self.each > 1 else None)


@pytest.fixture(autouse=True)
def _one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0)
    monkeypatch.setattr(manifest, "ThreadPoolExecutor", OneThread)


# Without shrinking, which takes minutes here: the schedule that failed is short enough to read.
ExactlyOnce.TestCase.settings = settings(
    max_examples=200,
    phases=[Phase.generate],
    stateful_step_count=40,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestExactlyOnce = ExactlyOnce.TestCase


class ExactlyOnceOfSamples(ExactlyOnce):
    """The same where rows have several answers: a row is there with all of them, or not at all."""

    samples = 3


class ExactlyOnceOfSamplesInRows(ExactlyOnce):
    """The same where each of a row's answers is a row of the output."""

    each = 3


ExactlyOnceOfSamplesInRows.TestCase.settings = settings(ExactlyOnce.TestCase.settings, max_examples=40)
TestExactlyOnceOfSamplesInRows = ExactlyOnceOfSamplesInRows.TestCase
ExactlyOnceOfSamples.TestCase.settings = settings(ExactlyOnce.TestCase.settings, max_examples=40)
TestExactlyOnceOfSamples = ExactlyOnceOfSamples.TestCase


@settings(max_examples=200)
@given(
    rows=st.integers(1, 6),
    of=st.integers(2, 3),
    flush_rows=st.integers(1, 4),
    is_overlapping=st.booleans(),
    schedule=st.lists(st.integers(0, 2), max_size=60),
)
def test_of_attempts_that_share_a_partition_the_last_one_seals_it(
    rows: int, of: int, flush_rows: int, is_overlapping: bool, schedule: list[int]
) -> None:
    machine = ExactlyOnce()
    machine.start(rows=[rows], actors=[], conditional=True)

    def sharer(number: int) -> Callable[[Actor], object]:
        def is_mine(row: int) -> bool:
            return row % of == number or (is_overlapping and row % 2 == 0)

        return lambda actor: machine.one_attempt(actor, 0, f"a{number}", flush_rows, 1, is_mine=is_mine)

    for number in range(of):
        machine.spawn(sharer(number))
    for which in schedule:
        machine.let_go_on(which, 1, None)
    for actor in machine.actors:
        actor.finish()
    machine.nobody_misbehaved()
    machine.parts_are_whole_and_of_the_plan()
    assert all(actor.error is None for actor in machine.actors)
    assert len(machine.checked) == 1, "sealed"
    left = [key for key in machine.store.objects if STAGE in key]
    # A row that two have generated may be staged once more while the part is being put.
    assert not left or is_overlapping, left
