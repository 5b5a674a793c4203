"""With `input.order: prefix` every row is in one partition, beside rows that begin alike, and keeps its identity."""

from __future__ import annotations

import random
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny import batches_of, plan_of, rows_of, write

from batchrun import signals
from batchrun.dataset import reader
from batchrun.dataset.names import RowNames, names_of
from batchrun.dataset.order import BLOCK_PARTITIONS
from batchrun.dataset.plan import Plan, folders_of, joined
from batchrun.dataset.planner import make_plan
from batchrun.dataset.rows import places_in
from batchrun.errors import FaultCode, Interrupted
from batchrun.job.job import Job
from batchrun.job.settings import InputSettings


def ordered_settings(folder: Path, **how: Any) -> InputSettings:
    return InputSettings(path=str(folder), order="prefix", **how)


def write_docs(folder: Path, rows: int, docs: int, groups: int, files: int = 1, length: int = 300) -> None:
    """`docs` texts that differ from their first word on, in random order; `key` numbers the rows."""
    chance = random.Random(0)
    texts = [f"{i} document {i} says " + chance.randbytes(length // 2).hex() for i in range(docs)]
    which = [i % docs for i in range(rows)]
    chance.shuffle(which)
    for number in range(files):
        mine = range(rows * number // files, rows * (number + 1) // files)
        columns = {"key": list(mine), "doc": [texts[which[i]] for i in mine], "n": [which[i] for i in mine]}
        write(folder / f"f{number}.parquet", columns, groups=groups)


def everything(plan: Plan, how: InputSettings) -> list[tuple[int, int]]:
    """(key, row id) of each row, partition by partition."""
    return [
        pair
        for partition in plan.partitions
        for batch in batches_of(plan, how, partition, batch_rows=7)
        for pair in zip(batch.records["key"].to_pylist(), batch.row_ids.tolist(), strict=True)
    ]


@settings(max_examples=60, suppress_health_check=list(HealthCheck))
@given(
    layout=st.lists(st.lists(st.integers(0, 9), max_size=4), min_size=1, max_size=3),
    rows=st.integers(1, 12),
    size=st.sampled_from([1, 200, 1 << 28]),
    limit=st.sampled_from([None, 1, 5, 11]),
    filters=st.sampled_from([None, [["n", "<", 2]], [["key", ">=", 3]]]),
    leading=st.sampled_from([("s",), ("s", "n"), ("chat", "s"), ("n", "d")]),
    seed=st.integers(0, 5),
)
def test_every_row_is_in_one_partition_and_stays_itself(
    tmp_path_factory: pytest.TempPathFactory,
    layout: list[list[int]],
    rows: int,
    size: int,
    limit: int | None,
    filters: list[Any] | None,
    leading: tuple[str, ...],
    seed: int,
) -> None:
    folder, chance, key = tmp_path_factory.mktemp("in"), random.Random(seed), 0
    schema = pa.schema(
        [
            ("key", pa.int64()),
            ("n", pa.int64()),
            ("s", pa.string()),
            ("d", pa.dictionary(pa.int32(), pa.string())),
            ("chat", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ]
    )
    for number, groups in enumerate(layout):
        with pq.ParquetWriter(folder / f"f{number}.parquet", schema) as writer:
            for count in groups:
                columns = {
                    "key": range(key, key + count),
                    "n": [chance.choice([None, 0, 1, 2, 3]) for _ in range(count)],
                    "s": [
                        chance.choice([None, "", "a" * 70, "a" * 70 + "b", "c\u00fc"]) for _ in range(count)
                    ],
                    "d": [chance.choice([None, "x", "y"]) for _ in range(count)],
                    "chat": [
                        chance.choice([None, [], [{"role": "user", "content": chance.choice("ab")}]])
                        for _ in range(count)
                    ],
                }
                writer.write_table(pa.table(columns, schema=schema))
                key += count
    how = ordered_settings(folder, limit=limit, filters=filters)
    plain = how.model_copy(update={"order": None})
    plan, as_it_stands = (
        plan_of(how, rows=rows, size=size, leading=leading),
        plan_of(plain, rows=rows, size=size),
    )
    assert sorted(everything(plan, how)) == sorted(everything(as_it_stands, plain))
    assert plan.rows == as_it_stands.rows
    for partition in plan.partitions:
        groups = [part[:2] for part in partition.slices]
        assert partition.rows <= rows
        assert groups == sorted(set(groups)), "each row group is read once, from front to back"
    stored = Plan.from_parquet(plan.to_parquet())
    assert (stored.partitions, stored.hash) == (plan.partitions, plan.hash)
    assert plan_of(how, rows=rows, size=size, leading=leading).hash == plan.hash
    twice = joined([plan, plan])
    assert everything(twice, how) == 2 * everything(plan, how)
    assert [p.index for p in twice.partitions] == list(range(len(twice.partitions)))
    alone = Job.parse(
        "{prompt: {template: '{{ s }}'}, model: {name: m}, output: {path: out}, input: {path: x}}"
    )
    job = alone.model_copy(update={"input": how})
    for partition in plan.partitions:
        files = plan.files_of(partition)
        name = RowNames(partition, files, how, lambda: pytest.fail("the plan tells which rows they are"))
        batches = batches_of(plan, how, partition, batch_rows=3)
        names = [n for batch in batches for n in names_of(batch, files, how).to_pylist()]
        assert [name(row) for row in range(partition.rows)] == names
        places = [row for batch in places_in(job, plan)(partition.index) for row in batch.to_pylist()]
        assert [row["source_row"] for row in places] == [int(i) for b in batches for i in b.places]
        paths = [files[int(i)].path for batch in batches for i in batch.files]
        assert [row["source_file"] for row in places] == paths


def test_rows_that_begin_alike_are_in_one_partition_where_they_fit(tmp_path: Path) -> None:
    write_docs(tmp_path, rows=2000, docs=20, groups=300, files=3)
    how = ordered_settings(tmp_path)
    plan = plan_of(how, rows=330, leading=("doc",))
    homes = Counter()
    for partition in plan.partitions:
        docs = [n for batch in batches_of(plan, how, partition) for n in batch.records["n"].to_pylist()]
        homes.update(set(docs))
        runs = 1 + sum(a != b for a, b in pairwise(docs))
        assert runs == len(set(docs)), "rows of one document stand together"
    assert set(homes.values()) == {1}
    assert len(plan.partitions) == 7  # of 3 documents


def test_texts_that_differ_late_are_told_apart_and_stay_close(tmp_path: Path) -> None:
    chance = random.Random(1)
    base = chance.randbytes(3000).hex()
    texts = [base + f"{i:04}" for i in range(4)] + [chance.randbytes(40).hex() + base for _ in range(4)]
    rows = [chance.randrange(8) for _ in range(200)]
    write(tmp_path / "a.parquet", {"key": range(200), "n": rows, "doc": [texts[i] for i in rows]}, groups=9)
    how = ordered_settings(tmp_path)
    (partition,) = (plan := plan_of(how, rows=200, leading=("doc",))).partitions
    seen = [n for batch in batches_of(plan, how, partition) for n in batch.records["n"].to_pylist()]
    runs = [a for a, b in zip(seen, [*seen[1:], None], strict=True) if a != b]
    assert len(runs) == 8, "each text once"
    alike = [i for i, n in enumerate(runs) if n < 4]
    assert alike == list(range(alike[0], alike[0] + 4)), "those with one beginning are neighbours"


def test_a_row_group_is_read_for_a_bounded_number_of_partitions(tmp_path: Path) -> None:
    write_docs(tmp_path, rows=4000, docs=4000, groups=50, length=20)
    plan = plan_of(ordered_settings(tmp_path), rows=20, leading=("doc",))
    readers = Counter(part[:2] for partition in plan.partitions for part in partition.slices)
    assert max(readers.values()) <= BLOCK_PARTITIONS * 8 / 7 + 1
    assert plan.bytes_read <= (BLOCK_PARTITIONS * 8 / 7 + 1) * sum(plan.files[0].group_bytes)


def test_long_values_count_with_what_they_take_in_memory(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {"key": range(100), "doc": ["x" * 1000] * 100})
    plan = plan_of(ordered_settings(tmp_path), size=10_000, leading=("doc",))
    assert max(partition.rows for partition in plan.partitions) == 10


def test_folders_of_the_output_are_not_mixed(tmp_path: Path) -> None:
    for day in range(3):
        write(tmp_path / f"day={day}/a.parquet", {"key": range(30), "doc": ["x", "y", "z"] * 10})
    plan = make_plan(ordered_settings(tmp_path), [], 20, 1 << 28, ["day"], ["doc"])
    assert all(len(plan.files_of(partition)) == 1 for partition in plan.partitions)
    assert [folder for _, folder in folders_of(plan, ["day"])] == ["day=0/", "day=1/", "day=2/"]


def test_rows_of_a_damaged_page_are_lost_alone(tmp_path: Path) -> None:
    columns = {"key": range(3000), "doc": [f"{i % 3} text" * 9 for i in range(3000)]}
    how = {
        "write_page_checksum": True,
        "compression": "none",
        "use_dictionary": False,
        "data_page_size": 4096,
    }
    path = write(tmp_path / "a.parquet", columns, groups=1000, **how)
    chunk = pq.read_metadata(path).row_group(1).column(1)
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset + chunk.total_compressed_size // 2] ^= 1
    path.write_bytes(data)
    settings = ordered_settings(tmp_path)
    plan = plan_of(settings, rows=1500, leading=("doc",))
    found, lost = [], []
    for partition in plan.partitions:
        for batch in batches_of(plan, settings, partition, salvage=True, batch_rows=64):
            if batch.fault is not None:
                assert batch.fault.code == FaultCode.INPUT_CORRUPT
                assert batch.records["key"].null_count == len(batch.places)
                lost += batch.places.tolist()
            else:
                expected = batch.places + 1000 * batch.row_groups
                assert batch.records["key"].to_pylist() == expected.tolist()
                found += expected.tolist()
    assert len(found) + len(lost) == 3000
    assert set(range(1000)) | set(range(2000, 3000)) <= set(found)
    assert sorted(lost) == list(range(1000 - len(lost), 1000))


def test_a_plan_in_order_is_small(tmp_path: Path) -> None:
    write_docs(tmp_path, rows=100_000, docs=500, groups=10_000, length=20)
    plan = plan_of(ordered_settings(tmp_path), leading=("doc",))
    assert len(plan.to_parquet()) < 2 * plan.rows
    assert len(plan.partitions[0].order) == 4 * plan.partitions[0].rows


def test_a_plan_that_is_known_is_not_put_in_order_again(tmp_path: Path) -> None:
    write_docs(tmp_path, rows=100, docs=5, groups=30)
    how = ordered_settings(tmp_path)
    plan = plan_of(how, rows=40, leading=("doc",))
    again = make_plan(how, [], 40, 1 << 28, leading=["no such column"], known=plan)
    assert again.hash == plan.hash
    write(tmp_path / "more.parquet", {"key": [100], "doc": ["x"], "n": [0]})
    grown = make_plan(how, [], 40, 1 << 28, leading=["doc"], known=plan)
    assert grown.rows == 101


def test_two_hundred_thousand_rows_are_put_in_order_in_seconds(tmp_path: Path) -> None:
    write_docs(tmp_path, rows=200_000, docs=500, groups=10_000, length=1000)
    start = time.process_time()
    plan = plan_of(ordered_settings(tmp_path), leading=("doc", "n"))
    # 2.5 s on an idle machine.
    assert time.process_time() - start < 15
    assert plan.rows == 200_000


def test_values_of_every_kind_have_a_sketch(tmp_path: Path) -> None:
    table = pa.table(
        {
            "key": [0, 1, 2],
            "b": pa.array([b"\xff", None, b""]),
            "f": [0.5, None, 1.0],
            "m": pa.array([[("k", 1)], None, []], pa.map_(pa.string(), pa.int32())),
            "t": pa.array([0, None, 1], pa.timestamp("us", "Europe/Berlin")),
            "e": pa.nulls(3),
        }
    )
    write(tmp_path / "a.parquet", table)
    how = ordered_settings(tmp_path)
    plan = plan_of(how, leading=("b", "f", "m", "t", "e"))
    assert sorted(rows_of(plan, how)["key"].to_pylist()) == [0, 1, 2]
    assert np.unique(plan.partitions[0].places).tolist() == [0, 1, 2]


def test_a_row_group_of_many_partitions_is_sketched_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_docs(tmp_path, rows=1000, docs=10, groups=1000)
    passes: list[int] = []
    read_group = reader.read_group
    monkeypatch.setattr(reader, "read_group", lambda *a, **k: passes.append(1) or read_group(*a, **k))
    plan = plan_of(ordered_settings(tmp_path), rows=50, leading=("doc",))
    assert (len(plan.partitions), len(passes)) == (20, 1)


def test_planning_stops_when_the_process_is_told_to(tmp_path: Path) -> None:
    write_docs(tmp_path, rows=100, docs=10, groups=50)
    signals.stop.set()
    try:
        with pytest.raises(Interrupted):
            plan_of(ordered_settings(tmp_path), leading=("doc",))
    finally:
        signals.stop.clear()
