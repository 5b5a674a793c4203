"""Chunks, parts and the attempt at a partition, one at a time."""

from __future__ import annotations

import random
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty import FaultyStore
from hypothesis import given, settings
from hypothesis import strategies as st
from parts import (
    JOB_HASH,
    PLAN_HASH,
    SCHEMA,
    answers,
    attempt,
    carried,
    commit,
    faulty_folder,
    layout,
    store_of,
)
from parts import settings as output_settings

from batchrun.errors import ChangedError, OutputError, StorageError
from batchrun.output import attempt as attempt_module
from batchrun.output import chunk, part
from batchrun.output.attempt import Attempt
from batchrun.output.chunk import ANSWERS, BadChunk, Origin
from batchrun.output.layout import Layout
from batchrun.storage import Folder, folder

ORIGIN = Origin(PLAN_HASH, JOB_HASH, 0)


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder, "FIRST_WAIT", 0)


@pytest.fixture
def place() -> Folder:
    return faulty_folder()[0]


@pytest.fixture
def store(place: Folder) -> FaultyStore:
    return store_of(place)


# Layout


def test_keys_have_one_width_in_a_plan() -> None:
    assert layout(3).part(2) == "data/part-00002-abcdef01.parquet"
    assert layout(100_000).part(99_999) == "data/part-99999-abcdef01.parquet"
    wide = layout(100_001)
    assert wide.part(7) == "data/part-000007-abcdef01.parquet"
    assert wide.chunk(7, 12, "who", 3) == "_job/stage/000007-abcdef01/12-who-3.chunk"


@given(st.integers(1, 10**6), st.data())
def test_a_key_tells_its_partition(partitions: int, data: st.DataObject) -> None:
    plan = layout(partitions)
    partition = data.draw(st.integers(0, partitions - 1))
    assert plan.partition_of_part(plan.part(partition)) == partition
    assert plan.partition_of_chunk(plan.chunk(partition, 5, "who", 1)) == partition
    assert Layout("00" * 32, partitions).partition_of_part(plan.part(partition)) is None
    assert layout(partitions).partition_of_part(plan.part(partition) + ".tmp") is None
    assert layout(partitions).partition_of_part(Layout(PLAN_HASH, 2 * 10**6).part(10**6 + 1)) is None


# Chunks


def test_a_chunk_is_plain_parquet_and_reads_back() -> None:
    table = answers(0, [4, 1, 3], "me", failed=[3])
    data = chunk.encode(table, ORIGIN, "me")
    assert chunk.decode(data, ORIGIN, 5).equals(table)
    assert pq.read_table(pa.BufferReader(data)).equals(table)


@settings(max_examples=300)
@given(st.data())
def test_a_damaged_chunk_is_never_taken(data: st.DataObject) -> None:
    whole = chunk.encode(answers(0, [0, 2], "me"), ORIGIN, "me")
    kind = data.draw(st.sampled_from(["flip", "cut", "grow", "hole"]))
    at = data.draw(st.integers(0, len(whole) - 1))
    if kind == "flip":
        bad = whole[:at] + bytes([whole[at] ^ data.draw(st.integers(1, 255))]) + whole[at + 1 :]
    elif kind == "cut":
        bad = whole[:at]
    elif kind == "grow":
        bad = whole + data.draw(st.binary(min_size=1, max_size=20))
    else:
        end = data.draw(st.integers(at + 1, len(whole)))
        bad = whole[:at] + bytes(end - at) + whole[end:]
        if bad == whole:
            return
    with pytest.raises(BadChunk):
        chunk.decode(bad, ORIGIN, 3)


def test_every_single_byte_of_a_chunk_is_guarded() -> None:
    whole = chunk.encode(answers(0, [0, 2], "me"), ORIGIN, "me")
    for at in range(len(whole)):
        with pytest.raises(BadChunk):
            chunk.decode(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :], ORIGIN, 3)


@pytest.mark.parametrize(
    ("expected", "rows"),
    [
        (Origin("other", JOB_HASH, 0), 5),
        (Origin(PLAN_HASH, "other", 0), 5),
        (Origin(PLAN_HASH, JOB_HASH, 1), 5),
        (ORIGIN, 4),
    ],
)
def test_a_foreign_chunk_is_not_taken(expected: Origin, rows: int) -> None:
    data = chunk.encode(answers(0, [4, 1], "me"), ORIGIN, "me")
    with pytest.raises(BadChunk):
        chunk.decode(data, expected, rows)


@pytest.mark.parametrize("offsets", [[1, 1], [-1]])
def test_a_chunk_with_impossible_rows_is_not_taken(offsets: list[int]) -> None:
    with pytest.raises(BadChunk):
        chunk.decode(chunk.encode(answers(0, offsets, "me"), ORIGIN, "me"), ORIGIN, 5)


def test_another_parquet_file_is_no_chunk(tmp_path: Path) -> None:
    pq.write_table(pa.table({"row": [1]}), tmp_path / "x")
    for data in ((tmp_path / "x").read_bytes(), b"", b"<html>", b"batchrun-sha256:", b"PAR1PAR1"):
        with pytest.raises(BadChunk):
            chunk.decode(data, ORIGIN, 5)


def test_an_answer_that_quotes_the_digest_does_no_harm() -> None:
    table = answers(0, [0], "batchrun-sha256:" + "0" * 64)
    assert chunk.decode(chunk.encode(table, ORIGIN, "me"), ORIGIN, 1).equals(table)


# Attempts


def test_a_partition_within_the_limits_costs_four_requests(place: Folder, store: FaultyStore) -> None:
    receipt = commit(place, layout(2), 0, 6)
    assert store.counts() == {"find": 1, "info": 2, "create": 1}
    assert receipt.won
    assert place.list() == {receipt.key: receipt.bytes}


def test_staging_costs_a_put_a_chunk_and_one_listing_to_sweep(place: Folder, store: FaultyStore) -> None:
    commit(place, layout(2), 0, 6, flush_rows=2)
    assert store.counts() == {"find": 2, "info": 2, "create": 1, "put": 2, "delete": 2}
    assert list(place.list()) == [layout(2).part(0)]


def test_the_part_has_the_input_untouched_and_the_answers_in_order(place: Folder) -> None:
    one = attempt(
        place, layout(1), 0, 5, "me", columns={"answer": "reply", "error": "why"}, compression="zstd"
    )
    assert one.open() is None
    one.add(answers(0, [4, 0], "me"))
    one.add(answers(0, [3, 1, 2], "me", failed=[2]).to_batches()[0])
    receipt = one.seal(carried(0, 5), SCHEMA)
    table = pq.read_table(pa.BufferReader(place.read(receipt.key)))
    assert table.column_names == [
        "id",
        "n",
        "reply",
        "finish_reason",
        "prompt_tokens",
        "output_tokens",
        "status",
        "why",
    ]
    assert table.select(["id", "n"]).equals(pa.Table.from_batches(carried(0, 5)))
    assert table["reply"].to_pylist() == ["0/0 by me", "0/1 by me", None, "0/3 by me", "0/4 by me"]
    assert table["status"].to_pylist() == ["ok", "ok", "failed", "ok", "ok"]
    assert table.schema.field("reply").type == pa.string()
    summary = part.inspect(place, receipt.key)
    assert summary == receipt.summary
    assert (summary.rows, summary.ok, summary.failed, summary.output_tokens) == (5, 4, 1, 8)
    assert summary.errors == {"PROMPT_TOO_LONG": 1}


def test_odd_types_are_carried_as_they_are(place: Folder) -> None:
    table = pa.table(
        {
            "list": pa.array([[1, None], None, []], pa.list_(pa.int16())),
            "messages": pa.array([[{"role": "user", "content": "x"}], [], None]),
            "when": pa.array([1, None, 3], pa.timestamp("us", "Europe/Berlin")),
            "kind": pa.array(["a", "b", "a"]).dictionary_encode(),
            "money": pa.array([None, 1, 2], pa.decimal128(10, 2)),
            "bytes": pa.array([b"\xff", None, b""], pa.large_binary()),
        }
    )
    # Every batch has a dictionary of its own, as readers give them.
    batches = [
        pa.RecordBatch.from_arrays(
            [
                c.cast(pa.string()).dictionary_encode() if pa.types.is_dictionary(c.type) else c
                for c in batch.columns
            ],
            schema=table.schema,
        )
        for batch in table.to_batches(max_chunksize=1)
    ]
    one = attempt(place, layout(1), 0, 3, "me")
    one.open()
    one.add(answers(0, range(3)))
    receipt = one.seal(batches, table.schema)
    back = pq.read_table(pa.BufferReader(place.read(receipt.key))).select(table.column_names)
    assert back.schema.equals(table.schema)
    assert back.to_pylist() == table.to_pylist()


def test_no_rows_make_a_part_that_carries_the_schema(place: Folder) -> None:
    receipt = commit(place, layout(1), 0, 0)
    table = pq.read_table(pa.BufferReader(place.read(receipt.key)))
    assert table.num_rows == 0
    assert table.column_names[:3] == ["id", "n", "answer"]


def test_no_carried_columns_still_give_every_row(place: Folder) -> None:
    one = attempt(place, layout(1), 0, 4, "me")
    one.open()
    one.add(answers(0, range(4)))
    receipt = one.seal((batch.select([]) for batch in carried(0, 4)), pa.schema([]))
    assert pq.read_metadata(pa.BufferReader(place.read(receipt.key))).num_rows == 4


def test_a_later_attempt_goes_on_where_the_chunks_end(place: Folder) -> None:
    first = attempt(place, layout(1), 0, 6, "first")
    first.open()
    first.add(answers(0, [5, 1], "first"))
    first.flush()
    first.add(answers(0, [0], "first"))
    second = attempt(place, layout(1), 0, 6, "second")
    assert second.open() is None
    assert second.missing.tolist() == [0, 2, 3, 4]
    assert second.restored == 2
    second.add(answers(0, [0, 2, 3, 4], "second"))
    receipt = second.seal(carried(0, 6), SCHEMA)
    table = pq.read_table(pa.BufferReader(place.read(receipt.key)))
    assert [a.split()[-1] for a in table["answer"].to_pylist()] == ["second", "first"] + ["second"] * 3 + [
        "first"
    ]


def test_of_two_staged_answers_to_a_row_the_first_one_wins(place: Folder) -> None:
    zombie, other = (attempt(place, layout(1), 0, 2, who) for who in ("a", "b"))
    zombie.open()
    other.open()
    other.add(answers(0, [0], "b"))
    other.flush()
    zombie.add(answers(0, [0, 1], "a"))
    zombie.flush()
    third = attempt(place, layout(1), 0, 2, "c")
    third.open()
    assert third.covered
    table = pq.read_table(pa.BufferReader(place.read(third.seal(carried(0, 2), SCHEMA).key)))
    assert table["answer"].to_pylist() == ["0/0 by a", "0/1 by a"]


def test_a_damaged_chunk_costs_its_rows_only(place: Folder, store: FaultyStore) -> None:
    first = attempt(place, layout(1), 0, 4, "first")
    first.open()
    for row in range(3):
        first.add(answers(0, [row], "first"))
        first.flush()
    cut, empty = sorted(store.objects)[:2]
    store.objects[cut] = store.objects[cut][:-30]
    store.objects[empty] = b""
    second = attempt(place, layout(1), 0, 4, "second")
    second.open()
    assert second.missing.tolist() == [0, 1, 3]


def test_a_truncated_put_of_a_chunk_is_tried_again(place: Folder, store: FaultyStore) -> None:
    one = attempt(place, layout(1), 0, 2, "me")
    one.open()
    one.add(answers(0, [0]))
    store.script("put", "chunk", "truncate")
    one.flush()
    two = attempt(place, layout(1), 0, 2, "you")
    two.open()
    assert two.missing.tolist() == [1]


def test_a_flush_that_fails_keeps_the_rows(place: Folder, store: FaultyStore) -> None:
    one = attempt(place, layout(1), 0, 2, "me")
    one.open()
    one.add(answers(0, [0]))
    store.script("put", "chunk", "full")
    with pytest.raises(StorageError):
        one.flush()
    assert one.flush()
    assert not one.flush()
    one.add(answers(0, [1]))
    assert one.seal(carried(0, 2), SCHEMA).won


@pytest.mark.parametrize(("limit", "chunks"), [({"flush_rows": 3}, 3), ({"flush_bytes": 1}, 9), ({}, 0)])
def test_so_many_rows_or_bytes_make_a_chunk(
    place: Folder, store: FaultyStore, limit: dict[str, int], chunks: int
) -> None:
    one = attempt(place, layout(1), 0, 10, "me", **limit)
    one.open()
    for row in range(9):
        one.add(answers(0, [row]))
        one.maybe_flush()
    assert store.counts()["put"] == chunks


def test_so_many_seconds_make_a_chunk(
    place: Folder, store: FaultyStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(attempt_module.time, "monotonic", lambda: now)
    one = attempt(place, layout(1), 0, 4, "me", flush_seconds=15)
    one.open()
    one.add(answers(0, [0]))
    now += 14
    one.add(answers(0, [1]))
    assert not one.maybe_flush()
    now += 1
    assert one.maybe_flush()
    now += 60
    assert not one.maybe_flush()
    one.add(answers(0, [2]))
    assert not one.maybe_flush()
    assert store.counts()["put"] == 1


def test_the_last_rows_go_into_the_part_and_not_into_a_chunk(place: Folder, store: FaultyStore) -> None:
    one = attempt(place, layout(1), 0, 4, "me", flush_rows=1)
    one.open()
    one.add(answers(0, range(4)))
    assert one.covered
    assert not one.maybe_flush()
    assert store.counts()["put"] == 0


def test_a_lost_acknowledgement_is_success(place: Folder, store: FaultyStore) -> None:
    store.script("create", "data/", "lost")
    receipt = commit(place, layout(1), 0, 3)
    assert receipt.won
    assert store.counts()["create"] == 2


def test_the_second_of_two_attempts_takes_the_first_ones_part(place: Folder) -> None:
    zombie = attempt(place, layout(1), 0, 3, "zombie", flush_rows=1)
    zombie.open()
    zombie.add(answers(0, [0, 1, 2], "zombie", failed=[1]))
    zombie.flush()
    winner = commit(place, layout(1), 0, 3, "winner")
    assert winner.summary.failed == 1
    late = attempt(place, layout(1), 0, 3, "late")
    receipt = late.open()
    assert receipt is not None
    assert not receipt.won
    awake = zombie.seal(carried(0, 3), SCHEMA)
    assert not awake.won
    assert awake.summary == winner.summary
    assert list(place.list()) == [winner.key]


def test_chunks_stay_until_the_part_is_seen(place: Folder, store: FaultyStore) -> None:
    one = attempt(place, layout(1), 0, 3, "me")
    one.open()
    one.add(answers(0, [0, 1, 2]))
    one.flush()
    store.script("info", "data/", "stale")
    assert one.seal(carried(0, 3), SCHEMA).won
    assert len(place.list("_job/stage/")) == 1
    assert attempt(place, layout(1), 0, 3, "you").open() is not None
    assert place.list("_job/stage/") == {}


def test_chunks_swept_while_they_are_read_mean_a_part(place: Folder, store: FaultyStore) -> None:
    first = attempt(place, layout(1), 0, 3, "first")
    first.open()
    first.add(answers(0, [0, 1, 2]))
    first.flush()

    def commit_before_reading(operation: str, key: str) -> None:
        if operation == "read" and key.endswith(".chunk"):
            store.gate = None
            first.seal(carried(0, 3), SCHEMA)

    store.gate = commit_before_reading
    receipt = attempt(place, layout(1), 0, 3, "second").open()
    assert receipt is not None
    assert receipt.summary.attempt == "first"


def test_a_row_is_never_taken_twice_or_from_outside(place: Folder) -> None:
    one = attempt(place, layout(1), 0, 3, "me")
    one.open()
    one.add(answers(0, [0]))
    for rows in ([0], [1, 1], [3], [-1]):
        with pytest.raises(ValueError, match="rows"):
            one.add(answers(0, rows))
    assert one.missing.tolist() == [1, 2]
    with pytest.raises(ValueError, match="2 of 3 rows are missing"):
        one.seal(carried(0, 3), SCHEMA)


@pytest.mark.parametrize("length", [2, 4])
def test_an_input_of_another_length_makes_no_part(place: Folder, length: int) -> None:
    one = attempt(place, layout(1), 0, 3, "me")
    one.open()
    one.add(answers(0, range(3)))
    with pytest.raises(ChangedError, match="rows where the plan has 3"):
        one.seal(carried(0, length), SCHEMA)
    assert place.list() == {}


def test_a_full_disk_fails_the_part_cleanly(place: Folder, store: FaultyStore) -> None:
    one = attempt(place, layout(1), 0, 3, "me")
    one.open()
    one.add(answers(0, range(3)))
    store.script("create", "data/", "full")
    with pytest.raises(StorageError, match="no space left"):
        one.seal(carried(0, 3), SCHEMA)
    assert place.list() == {}
    assert one.seal(carried(0, 3), SCHEMA).won


def test_a_part_of_another_job_under_our_key_is_refused(place: Folder) -> None:
    receipt = commit(place, layout(1), 0, 3)
    with pytest.raises(OutputError, match="another job, plan or partition"):
        attempt(place, Layout(PLAN_HASH[:8] + "0" * 56, 1), 0, 3, "me").open()
    other = Attempt(place, layout(1), "another job", 0, 3, "me", output_settings())
    with pytest.raises(OutputError, match="another job, plan or partition"):
        other.open()
    place.put(receipt.key, b"PAR1 not really")
    with pytest.raises(OutputError, match="not a whole part"):
        attempt(place, layout(1), 0, 3, "me").open()


@settings(max_examples=200)
@given(st.integers(0, 2**32))
def test_a_damaged_part_is_an_error_or_counts_the_same(seed: int) -> None:
    rng = random.Random(seed)
    whole = WHOLE_PART
    at = rng.randrange(len(whole))
    bad = (
        whole[:at]
        if rng.random() < 0.3
        else whole[:at] + bytes([whole[at] ^ rng.randrange(1, 256)]) + whole[at + 1 :]
    )
    place = Folder("memory://damaged/out")
    place.put("data/x", bad)
    try:
        summary = part.inspect(place, "data/x")
    except OutputError:
        return
    assert (summary.rows, summary.ok + summary.failed) == (3, 3)


def _whole_part() -> bytes:
    place = Folder("memory://whole/out")
    return place.read(commit(place, layout(1), 0, 3).key)


WHOLE_PART = _whole_part()


def test_a_long_footer_is_read_in_two_steps(place: Folder, store: FaultyStore) -> None:
    names = [f"column_{i:04d}" for i in range(800)]
    wide = pa.table({name: [1, 2] for name in names})
    one = attempt(place, layout(1), 0, 2, "me")
    one.open()
    one.add(answers(0, range(2)))
    receipt = one.seal(wide.to_batches(), wide.schema)
    assert part.inspect(place, receipt.key).rows == 2
    assert store.counts()["read"] == 2


def test_a_partition_may_hold_many_row_groups(place: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(part, "ROW_GROUP_BYTES", 500)
    receipt = commit(place, layout(1), 0, 100)
    metadata = pq.read_metadata(pa.BufferReader(place.read(receipt.key)))
    assert metadata.num_row_groups > 3
    assert metadata.num_rows == 100


def test_a_part_of_thousands_of_tiny_files_is_put_together_in_seconds(place: Folder) -> None:
    """All that waited for a row group was measured anew with each file: minutes for 8,192 of them."""
    rows = 1500
    carried = pa.table({"id": range(rows)})
    one = attempt(place, layout(1), 0, rows, "me")
    one.open()
    one.add(answers(0, range(rows)))
    began = time.process_time()
    receipt = one.seal(carried.to_batches(max_chunksize=1), carried.schema)
    assert time.process_time() - began < 8
    assert part.inspect(place, receipt.key).rows == rows


def test_a_hundred_thousand_rows_go_through_without_a_loop_over_rows(place: Folder) -> None:
    rows = 100_000
    one = attempt(place, layout(1), 0, rows, "me", flush_rows=50_000)
    one.open()
    order = np.random.default_rng(0).permutation(rows)
    table = pa.table(
        {
            "row": order,
            "answer": pa.repeat(pa.scalar("x" * 100), rows),
            "finish_reason": pa.repeat(pa.scalar("stop"), rows),
            "prompt_tokens": pa.repeat(pa.scalar(1, pa.int32()), rows),
            "output_tokens": pa.repeat(pa.scalar(1, pa.int32()), rows),
            "status": pa.repeat(pa.scalar("ok"), rows),
            "error": pa.nulls(rows, pa.string()),
        },
        schema=ANSWERS,
    )
    begun = time.process_time()
    for start in range(0, rows, 1000):
        one.add(table.slice(start, 1000))
        one.maybe_flush()
    batches = pa.table({"n": np.arange(rows)}).to_batches(max_chunksize=1024)
    receipt = one.seal(batches, pa.schema([("n", pa.int64())]))
    assert receipt.summary.ok == rows
    # About 0.6 s here; a loop over rows takes ten times that.
    assert time.process_time() - begun < 4


# Several plans in one output


@given(
    st.lists(st.tuples(st.integers(1, 200_000), st.integers(0, 2**32 - 1)), min_size=1, max_size=5), st.data()
)
def test_no_key_changes_when_another_plan_follows(counts: list[tuple[int, int]], data: st.DataObject) -> None:
    plans = [(f"{number:08x}" + PLAN_HASH[8:], count) for count, number in counts]
    grown, before = Layout.of([*plans, ("f" * 64, 10**6)]), Layout.of(plans)
    partition = data.draw(st.integers(0, before.partitions - 1))
    assert grown.part(partition) == before.part(partition)
    assert grown.stage(partition) == before.stage(partition)
    assert grown.partition_of_part(before.part(partition)) == partition
    assert grown.partition_of_chunk(before.chunk(partition, 3, "who", 1)) == partition
    owner, end = 0, plans[0][1]
    while partition >= end:
        owner, end = owner + 1, end + plans[owner + 1][1]
    assert grown.hash_of(partition) == plans[owner][0]


def test_one_plan_has_the_keys_that_it_always_had() -> None:
    assert Layout.of([(PLAN_HASH, 3)]) == layout(3)


def test_a_retry_never_takes_up_what_a_run_or_another_retry_staged() -> None:
    plan = layout(3)
    first, second = (Layout(PLAN_HASH, 3, generation=number) for number in (1, 2))
    assert first.part(2) == plan.part(2)
    keys = [one.chunk(2, 0, "who", 1) for one in (plan, first, second)]
    for one, own in zip((plan, first, second), keys, strict=True):
        assert [one.partition_of_chunk(key) for key in keys] == [2 if key == own else None for key in keys]
