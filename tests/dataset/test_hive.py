"""Input in key=value folders: the keys are columns of prompts, filters and the output, which may have such folders."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.dataset as ds
import pyarrow.parquet as pq
import pytest
from tiny import plan_of, rows_of, write

import batchrun as library
from batchrun.commands.verify import verify
from batchrun.dataset import source
from batchrun.dataset.plan import Plan
from batchrun.dataset.planner import extend
from batchrun.errors import ChangedError, InputError, Interrupted
from batchrun.job.settings import InputSettings
from jobs import load, write_job

DAYS = ["2026-01-01", "2026-01-02", "2026-01-03"]


def write_lake(folder: Path, rows: int = 6) -> Path:
    for d, day in enumerate(DAYS):
        for country in ("DE", "a%20b"):
            texts = [f"{day} {country} {i}" for i in range(rows)]
            path = folder / f"day={day}/hour={d}/country={country}/f.parquet"
            write(path, {"text": texts, "n": list(range(rows))}, groups=4)
    return folder


def settings_of(folder: Path, **how: Any) -> InputSettings:
    return InputSettings(path=str(folder), **how)


def test_keys_of_folders_are_columns_with_their_types(tmp_path: Path) -> None:
    lake = write_lake(tmp_path / "lake")
    for path in (lake, f"{lake}/day=*/", f"{lake}/day=2026*/hour=?/*/*.parquet"):
        settings = InputSettings(path=str(path))
        plan = plan_of(settings, rows=5)
        table = rows_of(plan, settings)
        assert table.schema.field("day").type == pa.string()
        assert table.schema.field("hour").type == pa.int64()
        assert table.num_rows == 36
        for row in table.to_pylist():
            assert row["text"].startswith(f"{row['day']} ")
            assert row["hour"] == DAYS.index(row["day"])
            assert row["country"] in ("DE", "a b")
    only = settings_of(lake, columns=["hour"])
    assert rows_of(plan_of(only), only).column_names == ["hour"]
    dates = settings_of(lake, cast={"day": "date32"})
    assert plan_of(dates).schema.field("day").type == pa.date32()


def test_a_null_key_is_null_and_a_key_that_is_in_the_files_is_read_from_them(tmp_path: Path) -> None:
    write(tmp_path / "k=__HIVE_DEFAULT_PARTITION__/a.parquet", {"x": [1]})
    write(tmp_path / "k=007/a.parquet", {"x": [2]})
    settings = settings_of(tmp_path)
    assert rows_of(plan_of(settings), settings)["k"].to_pylist() == ["007", None]
    own = tmp_path / "own"
    write(own / "k=1/a.parquet", {"k": ["one"]})
    write(own / "k=2/a.parquet", {"k": ["two"]})
    settings = settings_of(own)
    assert rows_of(plan_of(settings), settings)["k"].to_pylist() == ["one", "two"]
    write(own / "k=3/a.parquet", {"x": [3]})
    write(tmp_path / "mixed/k=1/a.parquet", {"x": [1]})
    write(tmp_path / "mixed/k=2/a.parquet", {"k": ["two"]})
    with pytest.raises(InputError, match="'k' is a column of this file and only a folder's key of others"):
        plan_of(settings_of(tmp_path / "mixed"))


@pytest.mark.parametrize(
    ("filters", "days", "rows"),
    [
        ([["day", ">=", "2026-01-02"]], 2, 24),
        ([["hour", "=", 1], ["n", "<", 2]], 1, 4),
        ([[["hour", "in", [0, 2]]], [["n", "=", 5]]], 3, 26),
        ([["country", "=", "a b"], ["day", "!=", "2026-01-01"]], 2, 12),
        ([["day", "=", "1999-01-01"]], 1, 0),
    ],
)
def test_filters_on_keys_open_only_the_files_that_may_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, filters: Any, days: int, rows: int
) -> None:
    lake = write_lake(tmp_path / "lake")
    opened: list[str] = []
    reading = source._read_footer
    monkeypatch.setattr(source, "_read_footer", lambda f, o: (opened.append(f.path), reading(f, o))[1])
    settings = settings_of(lake, filters=filters)
    plan = plan_of(settings)
    # The first file's footer is looked at in any case: a key in the files themselves would not prune.
    assert len({path.split("day=")[1][:10] for path in opened[1:]}) == days
    assert plan.rows == rows
    table = rows_of(plan, settings)
    expected = ds.dataset(str(lake), partitioning=ds.partitioning(
        pa.schema([("day", pa.string()), ("hour", pa.int64()), ("country", pa.string())]), flavor="hive"
    )).to_table(filter=pq.filters_to_expression([tuple(t) for t in filters] if isinstance(filters[0][0], str) else [[tuple(t) for t in g] for g in filters]))  # fmt: skip # noqa: E501
    assert sorted(table["text"].to_pylist()) == sorted(expected["text"].to_pylist())


def test_a_plan_keeps_keys_and_new_folders_keep_the_type_of_the_first(tmp_path: Path) -> None:
    write(tmp_path / "k=x/a.parquet", {"t": ["1"]})
    settings = settings_of(tmp_path, since="last")
    plan = plan_of(settings)
    again = Plan.from_parquet(plan.to_parquet())
    assert (again.files, again.hash) == (plan.files, plan.hash)
    write(tmp_path / "k=2/a.parquet", {"t": ["2"]})
    more = extend([plan], settings, (), 10, 10**6)
    assert more is not None
    assert rows_of(more, settings)["k"].to_pylist() == ["2"]
    whole = tmp_path / "whole"
    write(whole / "k=1/a.parquet", {"t": ["1"]})
    first = plan_of(settings_of(whole, since="last"))
    write(whole / "k=x/a.parquet", {"t": ["2"]})
    with pytest.raises(
        InputError, match=r"the folder k=x is not of type int64.*set input\.cast: \{k: string\}"
    ):
        extend([first], settings_of(whole, since="last"), (), 10, 10**6)


def job_over(folder: Path, model: Path, **sections: Any) -> Path:
    write_lake(folder / "lake")
    output = {"path": "out", "rows_per_part": 4, "flush_rows": 2, **sections.pop("output", {})}
    return write_job(
        folder, model, rows=1, input={"path": "lake"}, prompt={"template": "{{ day }} {{ country }} {{ n }}"},
        output=output, **sections,
    )  # fmt: skip


def test_keys_are_used_in_prompts_and_carried_into_the_output(tmp_path: Path, tiny_llama, cluster) -> None:
    job = job_over(tmp_path, tiny_llama)
    assert library.run(job, client=cluster).ok == 36
    table = ds.dataset(tmp_path / "out/data").to_table()
    for row in table.to_pylist():
        assert row["answer"] == f"{row['day']} {row['country']} {row['n']}"
    assert verify(load(job)).found.passed


def test_partition_by_writes_folders_that_readers_read_as_one_column(
    tmp_path: Path, tiny_llama, cluster
) -> None:
    by = {"partition_by": ["day", "country"], "rows_per_part": 100, "failed": "failed"}
    job = job_over(tmp_path, tiny_llama, output=by)
    result = library.run(job, client=cluster)
    assert (result.ok, result.parts) == (36, 6)
    data = tmp_path / "out/data"
    assert len(list(data.glob("day=*/country=*/part-*.parquet"))) == 6
    assert "day" not in pq.read_schema(next(data.glob("day=*/*/*.parquet"))).names
    for table in (pq.read_table(data), ds.dataset(data, partitioning="hive").to_table()):
        assert table.column_names.count("day") == 1
        assert table.num_rows == 36
        for row in table.to_pylist():
            assert row["answer"] == f"{row['day']} {row['country']} {row['n']}"
    assert verify(load(job)).found.passed
    frame = result.to_dask().compute()
    assert sorted(set(frame["day"])) == DAYS
    assert library.run(job, client=cluster).requests == 0
    stray = data / "day=2026-01-02/country=DE" / next((data / "day=2026-01-01/country=DE").iterdir()).name
    stray.write_bytes(next((data / "day=2026-01-01/country=DE").iterdir()).read_bytes())
    assert not verify(load(job)).found.passed, "a part in a folder of another value is foreign"


def test_a_partitioned_output_resumes_grows_and_retries(tmp_path: Path, tiny_llama, cluster) -> None:
    by = {"partition_by": ["day"], "rows_per_part": 5, "failed": "failed"}
    job = job_over(tmp_path, tiny_llama, output=by)
    since = ("input.since=last", "limits.max_error_rate=1.0")
    stop = threading.Event()
    with pytest.raises(Interrupted):
        library.run(
            load(job, *since, "engine.kind=engines:SecondsEngine"),
            client=cluster,
            stop=stop,
            on_progress=lambda now: stop.set() if now.counts.rows > 6 else None,
        )
    whole = load(job, *since)
    result = library.run(whole, client=cluster)
    assert result.ok == 36
    assert result.requests < 36
    write(tmp_path / "lake/day=2026-01-04/hour=3/country=FR/f.parquet", {"text": ["x", None], "n": [1, None]})
    result = library.run(whole, client=cluster)
    assert (result.rows, result.failed) == (38, 1)
    assert (tmp_path / "out/data/day=2026-01-04").is_dir()
    library.retry(whole, client=cluster)
    assert verify(whole).found.passed
    table = ds.dataset(tmp_path / "out/data", partitioning="hive").to_table()
    assert table.num_rows == 38


@pytest.mark.parametrize("column", ["text", "dya"])
def test_partition_by_takes_keys_of_the_input_alone(tmp_path: Path, tiny_llama, column: str) -> None:
    job = job_over(tmp_path, tiny_llama, output={"partition_by": [column]})
    with pytest.raises(InputError, match=r"input"):
        library.run(job)


def test_another_partition_by_is_a_changed_job(tmp_path: Path, tiny_llama, cluster) -> None:
    job = job_over(tmp_path, tiny_llama)
    library.run(job, client=cluster)
    with pytest.raises(ChangedError, match="partition_by"):
        library.run(load(job, "output.partition_by=[day]"), client=cluster)
