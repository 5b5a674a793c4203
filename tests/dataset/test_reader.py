"""A partition gives exactly the planned rows, as they are in the file, or says why not."""

from __future__ import annotations

import datetime
import os
import pickle
from decimal import Decimal
from pathlib import Path

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny import batches_of, plan_of, rows_of, write

from batchrun.dataset.plan import Plan
from batchrun.dataset.reader import read_partition
from batchrun.errors import ChangedError, CorruptInput, FaultCode
from batchrun.job.settings import InputSettings

ROLE_CONTENT = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))


def test_types_are_carried_through_untouched(tmp_path: Path) -> None:
    utc = datetime.UTC
    table = pa.table(
        {
            "id": pa.array([1, None, 2**62], pa.int64()),
            "small": pa.array([1, None, 255], pa.uint8()),
            "tags": [["a", None], None, []],
            "meta": pa.array([{"n": 1, "s": None}, None, {"n": None, "s": "x"}]),
            "chat": pa.array([[{"role": "user", "content": "hi"}], [], None], ROLE_CONTENT),
            "deep": pa.array(
                [[[{"a": [1]}]], None, [[]]], pa.list_(pa.list_(pa.struct([("a", pa.list_(pa.int8()))])))
            ),
            "kind": pa.array(["x", None, "x"]).dictionary_encode(),
            "at": pa.array(
                [datetime.datetime(2026, 1, 1, tzinfo=utc), None, None], pa.timestamp("us", "Europe/Berlin")
            ),
            "nanos": pa.array([1, None, 3], pa.timestamp("ns")),
            "price": pa.array([Decimal("1.10"), None, Decimal("-2.00")], pa.decimal128(9, 2)),
            "map": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
            "blob": pa.array([b"\xff\x00", None, b""], pa.large_binary()),
            "long": pa.array(["a", None, "b"], pa.large_string()),
        }
    )
    write(tmp_path / "a.parquet", table, groups=2)
    settings = InputSettings(path=str(tmp_path))
    for rows in (1, 2, 8192):
        read = rows_of(plan_of(settings, rows=rows), settings)
        assert read.schema.equals(table.schema)
        assert read.equals(table.cast(read.schema))


def test_nested_columns_survive_batches_smaller_and_larger_than_their_pages(tmp_path: Path) -> None:
    chat = [[{"role": "user", "content": f"{i}" * (i % 7)}] * (i % 4) for i in range(5000)]
    write(tmp_path / "a.parquet", {"chat": pa.array(chat, ROLE_CONTENT)}, groups=1700, data_page_size=512)
    settings = InputSettings(path=str(tmp_path))
    plan = plan_of(settings, rows=600)
    for batch_rows in (1, 77, 4096):
        read = [
            row
            for p in plan.partitions[:4]
            for b in batches_of(plan, settings, p, batch_rows=batch_rows)
            for row in b.records["chat"].to_pylist()
        ]
        assert read == chat[: len(read)]
        assert len(read) == sum(p.rows for p in plan.partitions[:4])


def test_a_huge_row_group_is_read_by_ranges_in_flat_memory(tmp_path: Path) -> None:
    columns = {"id": range(60_000), "text": [os.urandom(512).hex() for _ in range(60_000)]}
    write(tmp_path / "a.parquet", columns, compression="none", use_dictionary=False)
    settings = InputSettings(path=str(tmp_path))
    plan = plan_of(settings, rows=20_000)
    assert pq.read_metadata(tmp_path / "a.parquet").num_row_groups == 1
    assert [p.rows for p in plan.partitions] == [20_000] * 3
    part, before, peak, seen = plan.partitions[2], pa.total_allocated_bytes(), 0, []
    for batch in read_partition(part.slices, plan.files_of(part), plan.schema, ["id", "text"], None, {}, {}):
        peak = max(peak, pa.total_allocated_bytes() - before)
        seen += batch.records["id"].to_pylist()
    assert seen == list(range(40_000, 60_000))
    assert peak < 8 << 20  # the row group has 62 MB


def test_a_corrupt_page_is_named_by_file_and_row_group(tmp_path: Path) -> None:
    plan, settings = corrupt_plan(tmp_path)
    with pytest.raises(CorruptInput, match=r"a\.parquet, row group 1: a page cannot be decoded .*CRC"):
        rows_of(plan, settings)


def test_a_salvaged_partition_loses_only_the_slice_of_the_corrupt_page(tmp_path: Path) -> None:
    plan, settings = corrupt_plan(tmp_path)
    batches = batches_of(plan, settings, plan.partitions[0], salvage=True, batch_rows=64)
    rows = [(b.records["id"].to_pylist(), b.records["text"].to_pylist(), b.fault) for b in batches]
    ids = [i for own, _, _ in rows for i in own]
    lost = [i for i, value in enumerate(ids) if value is None]
    assert len(ids) == plan.rows == 3000
    assert lost == list(range(lost[0], 2000))
    assert 1000 <= lost[0] < 2000
    assert [i for i in ids if i is not None] == [*range(lost[0]), *range(2000, 3000)]
    assert {fault.code for own, _, fault in rows if fault} == {FaultCode.INPUT_CORRUPT}
    assert all((fault is None) == (own[0] is not None) for own, _, fault in rows)
    numbers = [i for b in batches for i in b.row_ids.tolist()]
    assert len(set(numbers)) == 3000


def corrupt_plan(folder: Path) -> tuple[Plan, InputSettings]:
    """A file of 3 row groups of 1000 rows, with a bit turned in the middle of the second one's texts."""
    columns = {"id": range(3000), "text": [f"text {i}" * 9 for i in range(3000)]}
    how = {
        "write_page_checksum": True,
        "compression": "none",
        "use_dictionary": False,
        "data_page_size": 4096,
    }
    path = write(folder / "a.parquet", columns, groups=1000, **how)
    chunk = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    settings = InputSettings(path=str(folder))
    return plan_of(settings), settings


def test_a_file_changed_after_planning_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"text": ["x"]})
    settings = InputSettings(path=str(tmp_path))
    plan = plan_of(settings)
    os.utime(path, (1, 1))
    with pytest.raises(ChangedError, match=r"a\.parquet: changed since it was planned"):
        rows_of(plan, settings)
    path.unlink()
    with pytest.raises(ChangedError, match=r"a\.parquet: planned, and now gone"):
        rows_of(plan, settings)


def test_a_change_that_hides_from_size_and_time_is_seen_by_the_rows_of_a_plan_without_footers(
    tmp_path: Path,
) -> None:
    path = write(tmp_path / "a.parquet", {"n": [1, 2, 3, 4]}, groups=2)
    settings = InputSettings(path=str(tmp_path), filters=[["n", "<", 4]])
    plan, before = plan_of(settings), path.stat()
    write(path, {"n": [1, 2, 7, 4]}, groups=2)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert path.stat().st_size == before.st_size
    with pytest.raises(ChangedError, match=r"a\.parquet: row group 1 gave 0 rows where 1 were planned"):
        rows_of(plan.without_footers(), settings)


def test_an_object_changed_in_a_store_is_refused_past_every_cache(tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.pipe("/changed/a.parquet", write(tmp_path / "a.parquet", {"n": [1, 2]}).read_bytes())
    settings = InputSettings(path="memory://changed/a.parquet")
    plan = plan_of(settings)
    assert rows_of(plan, settings).num_rows == 2
    fs.pipe("/changed/a.parquet", write(tmp_path / "a.parquet", {"n": [3, 2]}).read_bytes())
    with pytest.raises(ChangedError, match="changed since"):
        rows_of(plan, settings)


def test_what_crosses_to_a_worker_is_small(tmp_path: Path) -> None:
    for i in range(50):
        write(tmp_path / f"{i}.parquet", {"n": range(100)}, groups=10)
    plan = plan_of(InputSettings(path=str(tmp_path)), rows=100)
    part = plan.partitions[7]
    sent = pickle.dumps((part.slices, plan.files_of(part), plan.schema))
    assert len(sent) < 2000
    slices, files, schema = pickle.loads(sent)
    assert (
        sum(b.records.num_rows for b in read_partition(slices, files, schema, ["n"], None, {}, {}))
        == part.rows
    )


def test_only_the_asked_columns_are_given_in_the_asked_order(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"a": [1, 2], "b": ["x", "y"], "c": [1.0, 2.0]})
    settings = InputSettings(path=str(tmp_path), filters=[["c", ">", 1.5]])
    plan = plan_of(settings)
    part = plan.partitions[0]
    for columns in (["b", "a"], ["a"], []):
        (batch,) = read_partition(
            part.slices, plan.files_of(part), plan.schema, columns, settings.filters, {}, {}
        )
        assert (batch.records.schema.names, len(batch.row_ids)) == (columns, 1)
