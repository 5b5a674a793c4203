"""Replacing a part: one overwrite on every kind of store, and what a retry that was cut off leaves to the next one."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import boto3
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from parts import (
    JOB_HASH,
    SCHEMA,
    answers,
    attempt,
    carried,
    faulty_folder,
    layout,
    output,
    pin,
    store_of,
    unique,
)
from parts import settings as output_settings

from batchrun.errors import ChangedError, OutputError
from batchrun.output import manifest, retry
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout, retry_key
from batchrun.output.replace import ReplacingAttempt
from batchrun.output.retry import Retry
from batchrun.storage import Folder, folder

ROWS = [4, 3]
PLAN = layout(2)
JOB = Identity(
    PLAN.plan_hash, JOB_HASH, {"prompt": {"truncate": None, "template": "a"}}, "m", "0", created="now"
)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0)


@pytest.fixture
def place() -> Folder:
    return complete(faulty_folder()[0])


def complete(place: Folder) -> Folder:
    """Two parts, of which the first has failed rows 1 and 2."""
    pin(place, JOB)
    for partition, rows in enumerate(ROWS):
        one = attempt(place, PLAN, partition, rows, "run", compression="zstd")
        one.open()
        one.add(answers(partition, range(rows), "run", failed=[1, 2] if partition == 0 else []))
        one.seal(carried(partition, rows), SCHEMA)
    finish(place)
    return place


def finish(place: Folder) -> manifest.Manifest:
    return manifest.write(output(place, PLAN, ROWS))


def begin(
    place: Folder, errors: Iterable[str] = (), job: Identity = JOB, allow: Iterable[str] = ()
) -> Retry | None:
    found, _ = manifest.summaries(output(place, PLAN))
    written = manifest.read(place)
    assert written is not None
    recorded = [past.number for past in written.retries if past.finished]
    return retry.begin(place, job, errors, [*allow], found, recorded)


def reopened(place: Folder, one: Retry, who: str, **limits: object) -> ReplacingAttempt:
    plan = Layout(PLAN.plan_hash, PLAN.partitions, generation=one.number)
    return ReplacingAttempt(place, plan, 0, ROWS[0], who, output_settings(**limits), one)


def replace(place: Folder, one: Retry, who: str = "again", failed: Iterable[int] = ()) -> None:
    mine = reopened(place, one, who)
    assert mine.open() is None
    mine.add(answers(0, mine.missing, who, failed=[*failed]))
    assert mine.seal(carried(0, ROWS[0]), SCHEMA).won


def test_a_retry_carries_the_columns_of_the_part_and_needs_none_of_the_input(place: Folder) -> None:
    one = begin(place)
    assert one is not None
    before = pq.read_table(pa.BufferReader(place.read(PLAN.part(0)))).select(SCHEMA.names)
    mine = reopened(place, one, "again")
    assert mine.open() is None
    mine.add(answers(0, mine.missing, "again"))
    mine.seal(mine.carried.to_batches(), mine.carried.schema)
    after = pq.read_table(pa.BufferReader(place.read(PLAN.part(0)))).select(SCHEMA.names)
    assert after.equals(before)
    assert after.schema.equals(before.schema)


def texts(place: Folder) -> list[str | None]:
    return pq.read_table(pa.BufferReader(place.read(PLAN.part(0))))["answer"].to_pylist()


MENDED = ["0/0 by run", "0/1 by again", "0/2 by again", "0/3 by run"]


@pytest.mark.parametrize("kind", ["local", "memory", "s3"])
def test_a_part_is_replaced_on_every_kind_of_store(kind: str, tmp_path: Path, request: pytest.FixtureRequest):
    place = Folder(str(tmp_path / "out"))
    if kind == "memory":
        place = Folder(f"memory://{unique()}/out")
    if kind == "s3":
        endpoint, bucket = request.getfixturevalue("endpoint"), unique("bucket")
        keys = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing"}
        boto3.client("s3", "us-east-1", endpoint_url=endpoint, **keys).create_bucket(Bucket=bucket)
        place = Folder(
            f"s3://{bucket}/out", {"key": "testing", "secret": "testing", "endpoint_url": endpoint}
        )
    before = complete(place).list()
    one = begin(place)
    assert one is not None
    first = reopened(place, one, "killed", flush_rows=1)
    assert first.open() is None
    first.add(answers(0, [1], "again"))
    assert first.maybe_flush()
    second = reopened(place, one, "second")
    assert second.open() is None
    assert second.missing.tolist() == [2], "what an earlier attempt of this retry staged is taken up"
    second.add(answers(0, [2], "again"))
    assert second.seal(carried(0, ROWS[0]), SCHEMA).won
    assert texts(place) == MENDED
    done = finish(place)
    assert (done.failed, done.unfinished) == (0, None)
    assert set(place.list()) == {*before, retry_key(1)}, "nothing is left staged"
    assert begin(place) is None


def test_the_overwrite_is_one_put_and_other_parts_are_not_touched(place: Folder) -> None:
    one = begin(place)
    assert one is not None
    store = store_of(place)
    store.requests.clear()
    store.script("put", "data/", "lost")
    replace(place, one)
    written = [
        (operation, key.split("/")[-1]) for operation, key in store.requests if operation in ("put", "create")
    ]
    assert written == [("put", "part-00000-abcdef01.parquet")] * 2, (
        "and once more after a lost acknowledgement"
    )


def test_of_two_attempts_of_one_retry_the_second_leaves_the_part_alone(place: Folder) -> None:
    one = begin(place)
    assert one is not None
    late = reopened(place, one, "late")
    late.open()
    late.add(answers(0, late.missing, "late"))
    replace(place, one)
    receipt = late.seal(carried(0, ROWS[0]), SCHEMA)
    assert (receipt.won, receipt.summary.attempt) == (False, "again")
    assert reopened(place, one, "later").open() is not None
    assert texts(place) == MENDED


def test_a_retry_killed_before_the_manifest_is_finished_without_generating_anything(place: Folder) -> None:
    one = begin(place)
    assert one is not None
    replace(place, one, failed=[2])
    again = begin(place)
    assert again == one
    assert again.work(manifest.summaries(output(place, PLAN))[0]) == {}
    done = finish(place)
    assert [past.finished for past in done.retries] == [True]
    assert (done.failed, done.retries[0].parts[0].rows, done.retries[0].parts[0].ok) == (1, 2, 1)
    # Asked for once more, the row that failed again is tried again: by a retry of its own.
    more = begin(place)
    assert more is not None
    assert (more.number, more.work(manifest.summaries(output(place, PLAN))[0])) == (2, {0: 1})


def test_a_retry_killed_before_the_first_overwrite_goes_on_under_its_number(place: Folder) -> None:
    one = begin(place)
    finish(place)
    assert begin(place) == one
    done = manifest.read(place)
    assert done is not None
    assert done.unfinished is not None


def test_other_errors_than_the_unfinished_retry_asked_for_make_a_retry_of_their_own(place: Folder) -> None:
    begin(place)
    other = begin(place, ["PROMPT_TOO_LONG"])
    assert other is not None
    assert other.number == 2
    replace(place, other)
    done = finish(place)
    assert done.unfinished is None, "the one before was given up for it"


def test_nothing_failed_with_the_error_means_that_nothing_is_written(place: Folder) -> None:
    before = place.list()
    assert begin(place, ["OUT_OF_MEMORY"]) is None
    assert place.list() == before


def test_a_changed_job_may_free_rows_but_changes_answers_only_by_name(place: Folder) -> None:
    def job(**prompt: object) -> Identity:
        return Identity(
            PLAN.plan_hash, "9" * 64, {"prompt": {**JOB.settings["prompt"], **prompt}}, "m", "0", 2, "now"
        )

    with pytest.raises(ChangedError, match=r"prompt.template: a -> b\); .*--allow prompt.template"):
        begin(place, job=job(template="b", truncate="left"))
    other_model = Identity(PLAN.plan_hash, "8" * 64, JOB.settings, "other", "0", 2, "now")
    with pytest.raises(ChangedError, match=r"model: m -> other.*--allow model"):
        begin(place, job=other_model)
    one = begin(place, job=job(template="b"), allow=["prompt"])
    assert one is not None
    assert one.changes == ["prompt.template: a -> b"]
    replace(place, one)
    assert finish(place).retries[0].changes == one.changes
    # A run of a recorded job goes on here; of a job that nobody recorded it does not.
    recorded = [past.identity for past in retry.read(place)]
    assert not pin(place, job(template="b"), retried=lambda: recorded)
    with pytest.raises(ChangedError, match="model"):
        pin(place, other_model, retried=lambda: recorded)


def test_a_part_that_vanished_is_said_to_be_gone(place: Folder) -> None:
    one = begin(place)
    assert one is not None
    place.delete([PLAN.part(0)])
    with pytest.raises(OutputError, match="is gone; `batchrun run` makes it again"):
        reopened(place, one, "me").open()


def test_a_damaged_record_of_a_retry_is_named(place: Folder) -> None:
    begin(place)
    place.put(retry_key(1), b"{")
    with pytest.raises(OutputError, match=r"00001.json: damaged"):
        finish(place)
