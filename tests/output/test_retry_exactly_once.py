"""A retry under every interleaving, crash and fault that a search finds: each part is the old one or a new whole one,
what had succeeded stays as it was, and what a retry has staged is not generated again by it."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule
from interleaving import Actor, Interleaving, OneThread
from parts import (
    ASKED,
    FORMAT,
    JOB_HASH,
    SCHEMA,
    answers,
    attempt,
    carried,
    check_asked,
    faulty_folder,
    layout,
    output,
    pin,
    with_asked,
)
from parts import settings as output_settings

from batchrun.errors import BatchrunError
from batchrun.output import chunk, failed_rows, manifest, retry, verify
from batchrun.output.chunk import BadChunk, Origin
from batchrun.output.failed_rows import PLACE, FailedRows
from batchrun.output.identity import Identity
from batchrun.output.layout import MANIFEST, STAGE, Layout
from batchrun.output.part import read_summary
from batchrun.output.replace import ReplacingAttempt
from batchrun.storage import folder

SETTINGS = {"prompt": {"truncate": None}, "generation": {"max_new_tokens": 8}}
CODES = [[], ["PROMPT_TOO_LONG"], ["OUT_OF_MEMORY"]]
FAILED = "failed"


def pinned(plan: Layout) -> Identity:
    return Identity(plan.plan_hash, JOB_HASH, SETTINGS, "model", "0", created="now")


def fixed(plan: Layout) -> Identity:
    changed = {**SETTINGS, "prompt": {"truncate": "right"}}
    return Identity(plan.plan_hash, "9" * 64, changed, "model", "0", created="now")


def some_failed(partition: int, rows: int) -> pa.Table:
    """Answers of the first run: of every four one was too long, and one did not fit the memory."""
    table = answers(partition, range(rows), "run", failed=[r for r in range(rows) if r % 4 in (1, 2)])
    errors = ["OUT_OF_MEMORY: alone" if r % 4 == 2 else e for r, e in enumerate(table["error"].to_pylist())]
    place = table.schema.get_field_index("error")
    return with_asked(table.set_column(place, "error", pa.array(errors, pa.string())))


def places(partition: int, rows: int) -> list[pa.RecordBatch]:
    columns = [
        pa.array(["in.parquet"] * rows),
        pa.array([partition] * rows, pa.int32()),
        pa.array(range(rows)),
    ]
    return [
        pa.RecordBatch.from_arrays(
            [c.cast(f.type) for c, f in zip(columns, PLACE, strict=True)], schema=PLACE
        )
    ]


VERDICTS = st.sampled_from(
    [None] * 5 + ["crash", "crash after", "crash within", "reset", "lost", "busy", "truncate"] + ["stale"] * 2
)

# Which errors it retries, and how many rows it stages and generates at once.
RETRIES = st.tuples(st.sampled_from(CODES), st.integers(1, 3), st.integers(1, 2))


class Retries(Interleaving):
    # Rows of the output for each of the input.
    each = 1

    @initialize(
        rows=st.lists(st.integers(0, 7), min_size=1, max_size=3),
        actors=st.lists(RETRIES, min_size=1, max_size=3),
    )
    def start(self, rows: list[int], actors: list[tuple[list[str], int, int]]) -> None:
        self.rows, self.plan = rows, layout(len(rows))
        # Of parts.
        self.answers = [self.each * count for count in rows]
        self.settings = output_settings(failed=FAILED, columns=ASKED, each=self.each)
        self.folder, self.store = faulty_folder()
        self.root = self.folder.url.removeprefix("faulty://")
        self.output = output(self.folder, self.plan, rows, failed=FAILED, columns=ASKED, each=self.each)
        pin(self.folder, pinned(self.plan))
        for partition, count in enumerate(rows):
            who = f"run.{partition}"
            one = attempt(self.folder, self.plan, partition, count, who, columns=ASKED, each=self.each)
            one.answers = FORMAT
            one.open()
            one.add(some_failed(partition, self.answers[partition]))
            one.seal(carried(partition, count), SCHEMA)
        self.finish()
        self.kept = {
            f"{i}/{row}"
            for i, count in enumerate(self.answers)
            for row in range(count)
            if row % 4 not in (1, 2)
        }
        self.actors: list[Actor] = []
        self.started = 0
        self.checked: dict[str, bytes] = {}
        self.faults: list[str] = []
        self.store.gate, self.store.after = self.gate, self.observe
        for actor in actors:
            self.start_one(*actor)

    # What an actor does

    def one_retry(self, actor: Actor, who: str, errors: list[str], flush_rows: int, step: int) -> None:
        found, _ = manifest.summaries(self.output)
        written = manifest.read(self.folder)
        assert written is not None
        recorded = [past.number for past in written.retries if past.finished]
        one = retry.begin(self.folder, fixed(self.plan), errors, [], found, recorded)
        for partition in {} if one is None else one.work(found):
            assert one is not None
            actor.listed.clear()
            self.replace(actor, one, partition, f"{who}.{partition}", flush_rows, step)
        self.finish()

    def replace(
        self, actor: Actor, one: retry.Retry, partition: int, who: str, flush_rows: int, step: int
    ) -> None:
        plan = Layout(self.plan.plan_hash, self.plan.partitions, generation=one.number)
        rows = self.rows[partition]
        limits = output_settings(flush_rows=flush_rows, columns=ASKED, each=self.each)
        mine = ReplacingAttempt(self.folder, plan, partition, rows, who, limits, one)
        mine.answers = FORMAT
        if mine.open() is not None:
            return
        missing = np.flatnonzero(mine.missing_samples)
        assert {*mine.missing.tolist()} == {number // self.each for number in missing.tolist()}
        again = actor.listed.get(one.number, set()) & set(missing.tolist())
        kept = {f"{partition}/{row}" for row in missing} & self.kept
        if again or kept:
            self.faults.append(f"{who} generates {again or kept} of {partition} again")
        for first in range(0, len(missing), step):
            # Of the rows that were too long, every other one still is.
            some = missing[first : first + step]
            failed = [row for row in some if row % 8 == 5]
            mine.add(with_asked(answers(partition, some, who, failed=failed)))
            mine.maybe_flush()
        mine.seal(carried(partition, rows), SCHEMA)
        FailedRows(self.folder, plan, self.settings).update(partition, lambda i: places(i, rows))

    def finish(self) -> None:
        found, _ = manifest.summaries(self.output)
        self.output.failed_rows.complete(found, lambda i: places(i, self.rows[i]))
        manifest.write(self.output)

    # The search

    @rule(actor=RETRIES)
    def start_actor(self, actor: tuple[list[str], int, int]) -> None:
        if sum(not one.done for one in self.actors) < 3:
            self.start_one(*actor)

    def start_one(self, errors: list[str], flush_rows: int, step: int) -> None:
        self.started += 1
        who = f"a{self.started}"
        self.spawn(lambda actor: self.one_retry(actor, who, errors, flush_rows, step))

    @rule(which=st.integers(0, 2), requests=st.integers(1, 12), verdict=VERDICTS)
    def go_on(self, which: int, requests: int, verdict: str | None) -> None:
        self.let_go_on(which, requests, verdict)

    # What must hold

    def observe(self, operation: str, key: str, result: Any) -> None:
        key = key.removeprefix(f"{self.root}/")
        if operation == "find" and f"{STAGE}" in f"{key}/":
            for number in range(1, 20):
                plan = Layout(self.plan.plan_hash, self.plan.partitions, generation=number)
                for partition in range(len(self.rows)):
                    if key.rstrip("/") == plan.stage(partition).rstrip("/"):
                        self.me().listed.setdefault(number, self.staged(plan, partition, result))
        if operation == "delete" and key.startswith(STAGE):
            number = int(key.split("-r")[1].split("/")[0])
            partition = Layout(
                self.plan.plan_hash, self.plan.partitions, generation=number
            ).partition_of_chunk(key)
            assert partition is not None
            if self.summary(partition).generation < number:
                self.faults.append(f"{key} deleted before its part was replaced")

    def staged(self, plan: Layout, partition: int, keys: Collection[str]) -> set[int]:
        rows: set[int] = set()
        for key in keys:
            origin = Origin(plan.plan_hash, fixed(plan).job_hash, partition)
            try:
                table = chunk.decode(self.store.objects[key], origin, self.answers[partition])
            except (BadChunk, KeyError):
                continue
            rows.update(table["row"].to_pylist())
        return rows

    def summary(self, partition: int) -> Any:
        data = self.store.objects[f"{self.root}/{self.plan.part(partition)}"]
        return read_summary(pq.read_metadata(pa.BufferReader(data)), self.folder, "a part")

    @invariant()
    def every_part_is_whole_and_what_had_succeeded_is_untouched(self) -> None:
        if not hasattr(self, "checked"):
            return
        for partition, rows in enumerate(self.rows):
            key = f"{self.root}/{self.plan.part(partition)}"
            data = self.store.objects[key]
            if self.checked.get(key) is data:
                continue
            table = pq.read_table(pa.BufferReader(data))
            ids = [f"{partition}/{row}" for row in range(rows) for _ in range(self.each)]
            assert table["id"].to_pylist() == ids
            if self.each > 1:
                assert table["sample"].to_pylist() == [*range(self.each)] * rows
            for row, (status, answer) in enumerate(
                zip(table["status"].to_pylist(), table["answer"].to_pylist(), strict=True)
            ):
                if f"{partition}/{row}" in self.kept:
                    assert answer == f"{partition}/{row} by run"
                elif status == "ok":
                    assert answer.startswith(f"{partition}/{row} by a")
                else:
                    assert answer is None
            check_asked(table)
            self.checked[key] = data

    @invariant()
    def the_manifest_is_always_there(self) -> None:
        if hasattr(self, "checked"):
            assert f"{self.root}/{MANIFEST}" in self.store.objects

    @invariant()
    def nobody_misbehaved(self) -> None:
        if not hasattr(self, "checked"):
            return
        assert not self.faults
        for actor in self.actors:
            assert actor.error is None or isinstance(actor.error, BatchrunError), repr(actor.error)

    def teardown(self) -> None:
        if not hasattr(self, "checked"):
            return
        self.crash_all()
        last = self.spawn(lambda actor: self.one_retry(actor, "alast", [], 2, 2))
        last.finish()
        assert last.error is None, repr(last.error)
        self.every_part_is_whole_and_what_had_succeeded_is_untouched()
        self.store.gate = self.store.after = None
        self.nothing_is_left_to_mend_and_all_of_it_is_told()

    def nothing_is_left_to_mend_and_all_of_it_is_told(self) -> None:
        written = manifest.read(self.folder)
        assert written is not None
        assert written.unfinished is None
        left = sum(1 for rows in self.answers for row in range(rows) if row % 8 == 5)
        assert (written.rows, written.failed) == (sum(self.answers), left)
        for partition in range(len(self.rows)):
            # Who put which attempt in place of which is a chain from the run's own to the one that is there.
            past = self.summary(partition).retries
            chain = [past[0].old] + [one.new for one in past] if past else [f"run.{partition}"]
            assert chain[0] == f"run.{partition}"
            assert [one.old for one in past] == chain[:-1]
            assert chain[-1] == written.parts[partition].attempt == self.summary(partition).attempt
        checked = verify.verify(
            self.output, lambda i: carried(i, self.rows[i]), lambda i: places(i, self.rows[i]), FORMAT
        )
        assert checked.passed, checked.problems


@pytest.fixture(autouse=True)
def _one_step_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0)
    for module in (manifest, retry, failed_rows, verify):
        monkeypatch.setattr(module, "ThreadPoolExecutor", OneThread)


Retries.TestCase.settings = settings(
    max_examples=100,
    phases=[Phase.generate],
    stateful_step_count=30,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
TestRetries = Retries.TestCase


class RetriesOfSamplesInRows(Retries):
    """The same where each of a row's answers is a row of the output: a sample that was good stays as it was."""

    each = 2


RetriesOfSamplesInRows.TestCase.settings = settings(Retries.TestCase.settings, max_examples=40)
TestRetriesOfSamplesInRows = RetriesOfSamplesInRows.TestCase
