"""A plan covers every row exactly once, counts them exactly, and never depends on where it is made."""

from __future__ import annotations

import os
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import batches_of, plan_of, rows_of, write

from batchrun.dataset.location import find_files
from batchrun.dataset.plan import Partition, Plan, Slice, difference
from batchrun.dataset.source import DataFile
from batchrun.errors import InputError, OutputError
from batchrun.job.settings import InputSettings

BOUNDED = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])

layouts = st.lists(st.lists(st.integers(0, 40), max_size=4), min_size=1, max_size=4)
terms = st.one_of(
    st.tuples(st.just("n"), st.sampled_from(["=", "!=", "<", "<=", ">", ">="]), st.integers(-2, 12)),
    st.tuples(
        st.just("n"), st.sampled_from(["in", "not in"]), st.lists(st.integers(0, 10), min_size=1, max_size=4)
    ),
    st.tuples(st.just("s"), st.sampled_from(["=", "!=", "<", ">="]), st.sampled_from(["", "a", "b", "bb"])),
    st.tuples(st.just("x"), st.sampled_from(["<", ">=", "!="]), st.floats(-1, 2)),
)
filters = st.one_of(
    st.none(),
    st.lists(terms, min_size=1, max_size=3),
    st.lists(st.lists(terms, min_size=1, max_size=2), min_size=1, max_size=3),
)


def write_layout(folder: Path, layout: list[list[int]], seed: int) -> None:
    """A file per list, a row group per number; `key` numbers the rows of the whole dataset."""
    chance, key = random.Random(seed), 0
    schema = pa.schema([("key", pa.int64()), ("n", pa.int64()), ("s", pa.string()), ("x", pa.float64())])
    for number, groups in enumerate(layout):
        with pq.ParquetWriter(folder / f"f{number}.parquet", schema) as writer:
            for rows in groups:
                low = chance.randrange(8)
                columns = {
                    "key": range(key, key + rows),
                    "n": [chance.choice([None, *range(low, low + 4)]) for _ in range(rows)],
                    "s": [chance.choice([None, "", "a", "bb"]) for _ in range(rows)],
                    "x": [
                        chance.choice([None, 0.0, -0.0, 0.5, float("nan"), float("inf")]) for _ in range(rows)
                    ],
                }
                writer.write_table(pa.table(columns, schema=schema))
                key += rows


@BOUNDED
@given(
    layouts,
    st.integers(0, 1 << 30),
    filters,
    st.one_of(st.none(), st.integers(1, 200)),
    st.integers(1, 50),
    st.sampled_from([200, 1000, 1 << 28]),
)
def test_partitions_give_every_wanted_row_exactly_once_in_order(
    layout: list[list[int]], seed: int, chosen: list[Any] | None, limit: int | None, rows: int, size: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_layout(Path(folder), layout, seed)
        job = InputSettings(path=folder, filters=chosen, limit=limit)
        plan = plan_of(job, rows=rows, size=size)
        files = [str(Path(folder) / f"f{i}.parquet") for i in range(len(layout))]
        # pyarrow wants tuples, and knows nothing of limits
        oracle = pa.concat_tables(pq.read_table(f, filters=chosen) for f in files)["key"].to_pylist()[:limit]

        batches = [(p, batches_of(plan, job, p, batch_rows=7)) for p in plan.partitions]
        assert [k for _, own in batches for b in own for k in b.records["key"].to_pylist()] == oracle
        assert plan.rows == len(oracle)
        for partition, own in batches:
            assert partition.rows == sum(b.records.num_rows for b in own) <= rows
            assert [b.first for b in own] == [
                sum(x.records.num_rows for x in own[:i]) for i in range(len(own))
            ]
        ids = [i for _, own in batches for b in own for i in b.row_ids.tolist()]
        assert len(set(ids)) == len(oracle)
        assert [p.index for p in plan.partitions] == list(range(len(plan.partitions)))
        assert Plan.from_parquet(plan.to_parquet()).partitions == plan.partitions


@BOUNDED
@given(layouts, st.integers(0, 1 << 30), st.integers(1, 50), st.integers(1, 50))
def test_a_rows_number_does_not_depend_on_how_the_dataset_is_cut(
    layout: list[list[int]], seed: int, rows: int, other: int
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        write_layout(Path(folder), layout, seed)
        found = []
        for job, n in ((InputSettings(path=folder), rows), (InputSettings(path=folder), other)):
            plan = plan_of(job, rows=n)
            found.append(
                [i for p in plan.partitions for b in batches_of(plan, job, p) for i in b.row_ids.tolist()]
            )
        assert found[0] == found[1]
        job = InputSettings(path=folder, filters=[["n", ">=", 4]])
        plan = plan_of(job, rows=rows)
        chosen = {
            key: number
            for p in plan.partitions
            for b in batches_of(plan, job, p)
            for key, number in zip(b.records["key"].to_pylist(), b.row_ids.tolist(), strict=True)
        }
        assert all(found[0][key] == number for key, number in chosen.items())


def test_the_hash_does_not_depend_on_the_listings_order_or_the_threads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for i in range(12):
        write(tmp_path / f"{i:02}.parquet", {"n": range(i)}, groups=3)
    paths = [str(tmp_path / f"{i:02}.parquet") for i in range(12)]
    hashes = set()
    for cpus in (1, 8):
        monkeypatch.setattr(os, "cpu_count", lambda cpus=cpus: cpus)
        for order in (paths, paths[::-1], [str(tmp_path)], [str(tmp_path / "*"), *paths]):
            job = InputSettings(path=order, filters=[["n", ">", 2]])
            hashes.add(plan_of(job, rows=5).hash)
    assert len(hashes) == 1


def test_the_hash_tells_content_cuts_and_filters_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "a.parquet", {"n": range(100)})
    job = InputSettings(path=str(tmp_path))
    hashes = [
        plan_of(job).hash,
        plan_of(job, rows=10).hash,
        plan_of(job.model_copy(update={"limit": 5})).hash,
    ]
    hashes.append(plan_of(job.model_copy(update={"filters": [["n", "<", 50]]})).hash)
    os.utime(path, (1, 1))
    hashes.append(plan_of(job).hash)
    assert len(set(hashes)) == 5


def test_a_changed_input_is_told_file_by_file(tmp_path: Path) -> None:
    for name in ("gone", "grown", "same", "touched"):
        write(tmp_path / f"{name}.parquet", {"n": [1, 2]})
    job = InputSettings(path=str(tmp_path))
    old = plan_of(job)
    assert difference(old, plan_of(job)) == []
    (tmp_path / "gone.parquet").unlink()
    write(tmp_path / "new.parquet", {"n": [1]})
    write(tmp_path / "grown.parquet", {"n": range(1000)})
    os.utime(tmp_path / "touched.parquet", (1, 1))
    lines = difference(old, plan_of(job))
    assert [line.replace(str(tmp_path) + "/", "").split(" (")[0] for line in lines] == [
        "added: new.parquet",
        "changed: grown.parquet",
        "changed: touched.parquet",
        "removed: gone.parquet",
    ]
    assert "bytes, now" in lines[1]
    assert "version" in lines[2]
    assert difference(old, plan_of(job.model_copy(update={"limit": 1})))
    assert difference(plan_of(job), plan_of(job, rows=1))[0].startswith("the same files, cut differently")


@pytest.mark.parametrize("rows", [[], [0], [0, 0]])
def test_no_rows_at_all_are_one_empty_partition_with_the_schema(tmp_path: Path, rows: list[int]) -> None:
    write_layout(tmp_path, [rows, rows], 1)
    job = InputSettings(path=str(tmp_path))
    plan = plan_of(job, needed=("s",))
    assert plan.partitions == [Partition(0, (), 0)]
    assert (plan.rows, rows_of(plan, job).num_rows, plan.schema.names) == (0, 0, ["key", "n", "s", "x"])
    assert Plan.from_parquet(plan.to_parquet()).partitions == plan.partitions


def test_filters_that_no_row_passes_are_no_rows(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": [1, 3]})
    for value in (2, 9):  # inside the statistics, and outside
        assert plan_of(InputSettings(path=str(tmp_path), filters=[["n", "=", value]])).partitions == [
            Partition(0, (), 0)
        ]


def test_empty_row_groups_and_files_among_others_are_no_fault(tmp_path: Path) -> None:
    write_layout(tmp_path, [[0, 3, 0], [], [0], [2]], 1)
    job = InputSettings(path=str(tmp_path))
    assert rows_of(plan_of(job, rows=2), job)["key"].to_pylist() == [0, 1, 2, 3, 4]


def test_small_row_groups_go_together_and_a_huge_one_is_cut_evenly(tmp_path: Path) -> None:
    write_layout(tmp_path, [[10] * 5, [10] * 5, [1000]], 1)
    job = InputSettings(path=str(tmp_path))
    rows = [p.rows for p in plan_of(job, rows=300).partitions]
    assert rows == [100, 250, 250, 250, 250]
    by_bytes = plan_of(job, size=plan_of(job).files[2].group_bytes[0] // 4 + 1).partitions
    assert [p.rows for p in by_bytes][-4:] == [250] * 4


def test_a_limit_inside_a_row_group_is_exact_with_filters(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": [i % 10 for i in range(1000)]}, groups=300)
    job = InputSettings(path=str(tmp_path), filters=[["n", "=", 7]], limit=41)
    plan = plan_of(job, rows=25)
    assert plan.rows == 41
    last = plan.partitions[-1].slices[-1]
    assert (last.row_group, last.first_row + last.num_rows) == (1, 108)
    assert rows_of(plan, job)["n"].to_pylist() == [7] * 41


def test_filters_read_only_the_row_groups_that_can_match(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": range(1000), "day": pa.array(range(1000), pa.date32())}, groups=100)
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    start = pq.read_metadata(tmp_path / "a.parquet").row_group(2).column(0).data_page_offset
    damaged[start : start + 300] = b"\xff" * 300
    (tmp_path / "a.parquet").write_bytes(damaged)
    assert plan_of(InputSettings(path=str(tmp_path), filters=[["n", ">=", 700]])).rows == 300
    with pytest.raises(
        InputError, match=r"a\.parquet, row group 2: a page cannot be decoded .*filters need it"
    ):
        plan_of(InputSettings(path=str(tmp_path), filters=[["n", ">=", 250]]))


def test_dates_and_times_stand_as_text_in_filters(tmp_path: Path) -> None:
    days = pa.array([0, 365, None], pa.date32())
    times = days.cast(pa.timestamp("us"))
    write(
        tmp_path / "a.parquet",
        {"day": days, "at": times, "code": pa.array(["a", "b", "a"]).dictionary_encode()},
    )
    for chosen, rows in (
        ([["day", ">=", "1971-01-01"]], 1),
        ([["at", "<", "1970-06-01 12:00:00"]], 1),
        ([["day", "in", ["1970-01-01", "1971-01-01"]]], 2),
        ([["code", "=", "a"]], 2),
        ([[["code", "=", "b"]], [["day", "=", "1970-01-01"]]], 2),
    ):
        job = InputSettings(path=str(tmp_path), filters=chosen)
        plan = plan_of(job)
        assert (plan.rows, rows_of(plan, job).num_rows) == (rows, rows)


@pytest.mark.parametrize(
    ("chosen", "message"),
    [
        ([["m", "=", 1]], "column 'm'"),
        ([["n", "~", 1]], "unknown operator '~'"),
        ([["n", "="]], "is not a condition"),
        (["n", "=", 1], "is not a list of conditions|is not a condition"),
        ([["n", "in", 3]], "needs a list"),
        ([["n", "=", None]], "null holds for no row"),
        ([["n", "=", "abc"]], "n is int64"),
        ([["s", ">", 5]], "s is string"),
        ([["n", "=", 10**30]], "n is int64"),
        ([["l", "=", 1]], "l is list"),
    ],
)
def test_filters_that_cannot_be_are_refused(tmp_path: Path, chosen: list[Any], message: str) -> None:
    write(tmp_path / "a.parquet", {"n": [1], "s": ["x"], "l": [[1]]})
    with pytest.raises(InputError, match=message):
        plan_of(InputSettings(path=str(tmp_path), filters=chosen))


def test_a_damaged_plan_is_refused_not_believed(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": range(100)})
    data = plan_of(InputSettings(path=str(tmp_path)), rows=10).to_parquet()
    assert Plan.from_parquet(data).rows == 100
    forged = data.replace(b'"rows"', b'"rowz"')
    other = write(tmp_path / "b.parquet", {"n": [1]}).read_bytes()
    for damaged in (b"", data[:-9], data[:50] + b"\0" * 40 + data[90:], other, forged + b"x"):
        with pytest.raises(OutputError, match="the stored plan is damaged"):
            Plan.from_parquet(damaged)


def test_a_hundred_thousand_partitions_are_cheap_to_store() -> None:
    count = 100_000
    file = DataFile("s3://bucket/file.parquet", 1, "v", (8192 * count,), (1,))
    parts = [Partition(i, (Slice(0, 0, 8192 * i, 8192, 8192),), 8192) for i in range(count)]
    plan = Plan([file], pa.schema([("text", pa.string())]), parts)
    start = time.process_time()
    data = plan.to_parquet()
    again = Plan.from_parquet(data)
    assert time.process_time() - start < 6  # about 1 s on an idle machine
    assert again.hash == plan.hash
    assert len(data) < 4_000_000


def test_two_thousand_files_are_planned_in_seconds(tmp_path: Path) -> None:
    for i in range(2000):
        write(tmp_path / f"{i:04}.parquet", {"n": [i], "text": ["x"]})
    start = time.process_time()
    plan = plan_of(InputSettings(path=str(tmp_path)), needed=("text",))
    assert time.process_time() - start < 8  # 0.5 s on an idle machine
    assert (plan.rows, len(plan.files), len(plan.partitions)) == (2000, 2000, 1)


def test_the_files_of_one_partition_are_all_that_goes_with_it(tmp_path: Path) -> None:
    write_layout(tmp_path, [[5], [5], [5]], 1)
    plan = plan_of(InputSettings(path=str(tmp_path)), rows=10)
    assert [sorted(plan.files_of(p)) for p in plan.partitions] == [[0, 1], [2]]


def test_listing_finds_the_version_that_asking_by_name_finds(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"n": [1]})
    assert find_files([str(tmp_path)], {}) == find_files([str(tmp_path / "a.parquet")], {})


def test_the_bytes_of_a_plan_are_those_of_its_rows(tmp_path: Path) -> None:
    """It said those of whole files, however few rows of them were wanted."""
    path = write(tmp_path / "a.parquet", {"n": range(1000)}, groups=500)
    first, second = (pq.read_metadata(path).row_group(i).total_byte_size for i in range(2))
    whole, some = (plan_of(InputSettings(path=str(tmp_path), limit=limit)) for limit in (None, 50))
    assert whole.input_bytes == pytest.approx(first + second, abs=10)
    assert some.input_bytes == pytest.approx(first / 10, abs=10)
