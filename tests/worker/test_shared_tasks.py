"""Tiny partitions share a task: fewer tasks, and still each partition is judged and committed by itself."""

from __future__ import annotations

import types
from typing import Any

import pytest
from parts import commit, faulty_folder, layout, output

import batchrun as library
from batchrun.errors import StorageError
from batchrun.output import manifest, part
from batchrun.worker import task as worker
from batchrun.worker.task import run_partitions
from jobs import check_complete, write_job

ROWS = 240


def task(index: int) -> Any:
    return types.SimpleNamespace(partition=types.SimpleNamespace(index=index))


def receipt(index: int, committed: bool = True) -> Any:
    return types.SimpleNamespace(index=index, part=object() if committed else None)


def test_what_follows_a_failed_partition_goes_back_and_what_came_before_it_is_kept(monkeypatch):
    def run_partition(order: None, one: Any) -> Any:
        if one.partition.index == 2:
            raise StorageError("told to fail")
        return receipt(one.partition.index)

    monkeypatch.setattr(worker, "run_partition", run_partition)
    done = run_partitions(None, [task(i) for i in range(4)], 60.0)
    assert [one.index for one in done] == [0, 1]
    with pytest.raises(StorageError, match="told to fail"):
        run_partitions(None, [task(2), task(3)], 60.0)


@pytest.mark.parametrize(
    ("seconds", "committed", "kept"), [(60.0, True, 4), (0.0, True, 1), (60.0, False, 1)]
)
def test_a_task_begins_no_further_partition_when_its_time_is_over_or_it_is_to_stop(
    monkeypatch, seconds, committed, kept
):
    monkeypatch.setattr(worker, "run_partition", lambda order, one: receipt(one.partition.index, committed))
    assert len(run_partitions(None, [task(i) for i in range(4)], seconds)) == kept


def test_many_tiny_partitions_take_few_tasks_and_come_out_exact(tmp_path, tiny_llama, cluster, monkeypatch):
    sent: list[int] = []
    submit = cluster.submit

    def count(work: Any, *arguments: Any, **how: Any) -> Any:
        if work is run_partitions:
            sent.append(len(arguments[1]))
        return submit(work, *arguments, **how)

    monkeypatch.setattr(cluster, "submit", count)
    job = write_job(tmp_path, tiny_llama, rows=ROWS, output={"rows_per_part": 1})
    result = library.run(job, client=cluster)
    assert (result.parts, result.requests) == (ROWS, ROWS)
    assert max(sent) > 1
    assert len(sent) < ROWS
    check_complete(tmp_path / "out", ROWS)


def test_parts_that_a_run_has_receipts_of_are_not_read_again_unless_they_changed(monkeypatch):
    place, _ = faulty_folder()
    plan = layout(3)
    receipts = {i: commit(place, plan, i, 4) for i in range(3)}
    read: list[str] = []
    inspect = part.inspect
    monkeypatch.setattr(
        part, "inspect", lambda folder, key, size: read.append(key) or inspect(folder, key, size)
    )
    del receipts[1]
    other = commit(faulty_folder()[0], plan, 2, 4, who="another attempt")
    receipts[2] = other
    assert other.bytes != place.size(plan.part(2))
    manifest.write(output(place, plan, [4, 4, 4]), receipts)
    assert sorted(read) == [plan.part(1), plan.part(2)]
