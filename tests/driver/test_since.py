"""A table that grows by the day: `input.since: last` answers only files that no earlier run took."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun as library
from batchrun.commands.clean import clean
from batchrun.commands.status import status
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError, ExitCode, InputError, JobError
from jobs import answers, dataset, load, start, write_job


def day(folder: Path, number: int, table: pa.Table | None = None) -> None:
    """A new file of 20 rows, in two row groups."""
    (folder / "table").mkdir(exist_ok=True)
    rows = dataset(20 * number + 20).slice(20 * number) if table is None else table
    pq.write_table(rows, folder / f"table/day={number}.parquet", row_group_size=10)


def growing_job(folder: Path, model: Path, **sections: object) -> Path:
    source = {"path": "table", "since": "last", **sections.pop("input", {})}
    output = {"path": "out", "rows_per_part": 8, "flush_rows": 4, "flush_seconds": 0.3, "failed": "failed"}
    return write_job(folder, model, input=source, output=output, **sections)


def everything_under(folder: Path) -> dict[str, int]:
    return {str(p): p.stat().st_mtime_ns for p in sorted(folder.rglob("*")) if p.is_file()}


def texts(rows: int) -> list[str]:
    return dataset(rows)["text"].to_pylist()


@pytest.mark.timeout(280)
@pytest.mark.parametrize(("order", "parts"), [(None, 4), ("prefix", 3)])
def test_each_day_is_answered_once_through_a_kill_and_a_day_without_news(
    tmp_path, tiny_llama, cluster, order, parts
):
    day(tmp_path, 0)
    job = growing_job(tmp_path, tiny_llama, input={"order": order})
    assert library.run(job, client=cluster).requests == 20
    first = everything_under(tmp_path / "out/data")
    # The second day's run is killed in the middle, and a third day comes before it goes on.
    day(tmp_path, 1)
    process = start("run", str(job), "--set", "engine.kind=engines:SecondsEngine")
    deadline = time.monotonic() + 120
    while not list((tmp_path / "out").rglob("*.chunk")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    found = status(load(job))
    assert (found.complete, found.plans, found.rows) == (False, 2, 40)
    day(tmp_path, 2)
    result = library.run(job, client=cluster)
    assert (result.exit_code, result.rows, result.requests + result.reused) == (ExitCode.COMPLETE, 60, 40)
    assert result.reused > 0
    table = answers(tmp_path / "out")
    assert table["text"].to_pylist() == table["answer"].to_pylist()
    found = table["text"].to_pylist()
    days = [sorted(found[i : i + 20]) if order else found[i : i + 20] for i in range(0, 60, 20)]
    wanted = [sorted(texts(60)[i : i + 20]) if order else texts(60)[i : i + 20] for i in range(0, 60, 20)]
    assert days == wanted, "in the order of the days"
    now = everything_under(tmp_path / "out/data")
    assert {path: now[path] for path in first} == first, "the first day's parts are as they were"
    manifest = json.loads((tmp_path / "out/_job/manifest.json").read_text())
    assert [(plan["parts"], plan["rows"]) for plan in manifest["plans"]] == [(parts, 20)] * 3
    hashes = [plan["hash"][:8] for plan in manifest["plans"]]
    assert [Path(p).stem for p in now] == [f"part-{i:05d}-{hashes[i // parts]}" for i in range(3 * parts)]
    assert verify(load(job)).found.passed
    assert "of 3 plans" in "\n".join(status(load(job)).lines())
    # Nothing new: success, and not a byte is written.
    before = everything_under(tmp_path / "out")
    result = library.run(job, client=cluster)
    assert (result.exit_code, result.requests) == (ExitCode.COMPLETE, 0)
    assert everything_under(tmp_path / "out") == before
    clean(load(job), everything=True)
    assert not everything_under(tmp_path / "out")


def test_a_file_that_changed_after_it_was_taken_is_refused_and_named(tmp_path, tiny_llama, cluster):
    day(tmp_path, 0)
    day(tmp_path, 1)
    job = growing_job(tmp_path, tiny_llama)
    library.run(job, client=cluster)
    before = everything_under(tmp_path / "out")
    day(tmp_path, 1, dataset(41).slice(20))
    with pytest.raises(ChangedError, match=r"1 files changed since.*day=1\.parquet \(\d+ bytes") as caught:
        library.run(job, client=cluster)
    assert caught.value.exit_code == ExitCode.REFUSED
    assert everything_under(tmp_path / "out") == before


def test_a_new_file_brings_the_columns_and_types_of_the_first_ones(tmp_path, tiny_llama, cluster):
    day(tmp_path, 0)
    job = growing_job(tmp_path, tiny_llama)
    library.run(job, client=cluster)
    rows = dataset(40).slice(20)
    day(tmp_path, 1, rows.append_column("more", pa.array(range(20))))
    library.run(job, client=cluster)
    assert "more" not in answers(tmp_path / "out").column_names
    day(tmp_path, 2, rows.set_column(0, "id", rows["id"].cast(pa.string())))
    with pytest.raises(InputError, match="column 'id' is string in the new files and was int64"):
        library.run(job, client=cluster)
    assert verify(load(job)).found.passed


def test_without_since_a_grown_table_is_refused_and_with_it_an_old_output_grows(
    tmp_path, tiny_llama, cluster
):
    day(tmp_path, 0)
    job = growing_job(tmp_path, tiny_llama)
    whole = load(job, "input.since=null")
    library.run(whole, client=cluster)
    day(tmp_path, 1)
    with pytest.raises(ChangedError, match=r"added: .*day=1\.parquet"):
        library.run(whole, client=cluster)
    assert library.run(job, client=cluster).requests == 20
    with pytest.raises(ChangedError, match="holds answers of another job"):
        library.run(whole, client=cluster)
    assert verify(load(job)).found.passed


def test_failed_rows_of_several_days_are_retried_together(tmp_path, tiny_llama, cluster):
    job = growing_job(tmp_path, tiny_llama, prompt={"max_bytes": 15}, limits={"max_error_rate": 1.0})
    for number in range(2):
        day(tmp_path, number)
        result = library.run(job, client=cluster)
    failed = sum(len(text) > 15 for text in texts(40))
    assert (result.rows, result.failed) == (40, failed)
    assert pq.read_table(tmp_path / "out/failed").num_rows == failed
    fixed = load(job, "prompt.max_bytes=1000")
    assert library.retry(fixed, client=cluster).requests == failed
    # The fixed job is one of this output now: the next day may be of it.
    day(tmp_path, 2)
    result = library.run(fixed, client=cluster)
    assert (result.requests, result.failed) == (20, 0)
    assert answers(tmp_path / "out")["answer"].to_pylist() == texts(60)
    assert verify(fixed).exit_code == ExitCode.COMPLETE
    assert status(fixed).complete


def test_a_bad_file_that_is_left_out_is_taken_once_it_is_mended(tmp_path, tiny_llama, cluster):
    day(tmp_path, 0)
    (tmp_path / "table/day=1.parquet").write_bytes(b"<html>")
    job = growing_job(tmp_path, tiny_llama, input={"skip_bad_files": True})
    assert library.run(job, client=cluster).rows == 20
    assert library.run(job, client=cluster).requests == 0
    day(tmp_path, 1)
    assert library.run(job, client=cluster).requests == 20
    assert answers(tmp_path / "out")["answer"].to_pylist() == texts(40)


def test_a_limit_does_not_go_with_growth(tmp_path, tiny_llama):
    day(tmp_path, 0)
    with pytest.raises(JobError, match="limit leaves rows of taken files out"):
        load(growing_job(tmp_path, tiny_llama, input={"limit": 3}))
