"""Many simulated GPUs: what is counted and calculated of them, and a run on two of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from counting_s3 import kind, place

from tests.measure import many_gpus

UNITS: dict[str, Any] = {
    "tasks": 10,
    "scheduler": {"idle": 0.01, "heartbeat": 1e-3, "look": 1e-4},
    "burst": {"driver_task": 2e-3, "scheduler_task": 3e-3},
    "many": [{"workers": 1024, "bytes": 2_000_000, "loads": 0.04, "show": 0.06}],
    "task_bytes": 3600,
    "receipt_bytes": 400,
    "requests": {
        "PUT out/data": 10, "PUT out/_job/stage": 30, "DELETE bucket": 10, "HEAD out/data": 20, "GET out/data": 68,
        "LIST out/_job/stage": 20, "GET in": 40, "HEAD in": 40, "PUT out/_job": 22,
    },
}  # fmt: skip


def test_requests_of_a_partition_are_told_by_what_a_store_limits():
    assert many_gpus.per_part(UNITS) == {"writes": 5.0, "reads": 4.0, "input": 8.0}


def test_load_grows_with_tasks_and_with_workers():
    found = many_gpus.load(UNITS, 1024)
    tasks = 1024 * 1762 / 8192
    # Dask's scheduler has so many workers tell of themselves every 6.12 s.
    beats = 1024 / 6.12
    expected = {
        "tasks": tasks, "driver, looks": 0.1, "driver, tasks": tasks * 2e-3,
        "scheduler, heartbeats": 0.01 + beats * 1e-3, "scheduler, looks": 0.1024, "scheduler, tasks": tasks * 3e-3,
        "writes": tasks * 5, "reads": tasks * 4, "reads of the input": tasks * 8,
        "bytes to the driver": 2_000_000 + tasks * 4000,
    }  # fmt: skip
    assert found == pytest.approx(expected)
    halved = many_gpus.load(UNITS, 1024, rows_per_part=2 * 8192)
    assert halved["driver, tasks"] == pytest.approx(found["driver, tasks"] / 2)
    assert halved["driver, looks"] == found["driver, looks"]


def test_where_each_is_saturated_follows_from_what_a_task_asks_of_it():
    found = many_gpus.saturated(UNITS)
    tasks = 1762 / 8192
    assert found["driver"] == pytest.approx(1 / (0.1 / 1024 + tasks * 2e-3))
    assert found["scheduler"] == pytest.approx((1 - 0.01 - 0.2) / (1e-4 + tasks * 3e-3))
    assert found["both in one process"] < min(found["driver"], found["scheduler"])
    assert (found["writes"], found["reads"]) == pytest.approx((3500 / tasks / 5, 5500 / tasks / 12))


def test_gaps_are_from_the_end_of_a_task_to_the_next_one_of_the_same_worker(tmp_path: Path):
    (tmp_path / "0").write_text(
        "1.0 begins\n1.1 begins\n5.0 ends\n5.2 begins\n6.0 ends\n6.1 begins\n99.0 ends\n"
    )
    (tmp_path / "1").write_text("1.0 begins\n7.0 ends\n")
    found = many_gpus.gaps(tmp_path, [{"at": 0.5}, {"at": 50.0}])
    assert found["count"] == 2
    assert found["most"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("method", "query", "expected"),
    [
        ("GET", "list-type=2&prefix=out%2Fdata", "LIST"),
        ("GET", "", "GET"),
        ("POST", "delete", "DELETE"),
        ("PUT", "", "PUT"),
    ],
)
def test_a_request_is_counted_as_its_kind(method: str, query: str, expected: str):
    assert kind(method, query) == expected


def test_a_key_is_counted_by_its_folder_without_its_partition():
    assert place("/answers/out/_job/stage/00012-3f9a1c07/0-9c1e-1.chunk", "") == "out/_job/stage"
    assert place("/answers/out/data/part-00012-3f9a1c07.parquet", "") == "out/data"
    assert place("/answers", "list-type=2&prefix=out%2F_job%2Fstage%2F00012-3f9a1c07%2F") == "out/_job/stage"


@pytest.mark.timeout(300)
def test_a_run_on_two_simulated_gpus_gives_the_units_of_its_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(many_gpus, "CALM", 1.0)
    units = many_gpus.measure(tmp_path, workers=2, tasks=4, part_rows=16, stretch=0.5, burst=0)
    asked = many_gpus.per_part(units)
    assert asked["writes"] > 2
    assert units["requests"]["PUT out/data"] == units["tasks"] == 8
    assert [one["workers"] for one in units["many"]] == [64, 256, 1024]
    assert units["many"][2]["bytes"] > 10 * units["many"][0]["bytes"]
    assert units["receipts"]["together, clock"] > 0
    assert json.loads(json.dumps(units)) == units
