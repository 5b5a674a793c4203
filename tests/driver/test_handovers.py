"""Real runs whose last partitions are shared out: each row generated once, one part each, whoever is killed."""

from __future__ import annotations

import json
import os
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from paced_engine import SLOW, STEP

from jobs import start_driver, wait_until, write_job

PARTS, ROWS = 4, 60


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> Path:
    """Four partitions on two workers, one at half the speed of the other: a tail of seconds, and nothing else."""
    path = write_job(
        tmp_path, tiny_llama, generation={"max_new_tokens": 90}, engine={"kind": "paced_engine:PacedEngine"},
        output={"rows_per_part": ROWS, "flush_rows": 20}, cluster={"workers": 2},
    )  # fmt: skip
    texts = [f"row {i} ".ljust(20 + (i * 37) % 60, "x") for i in range(PARTS * ROWS)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet", row_group_size=ROWS)
    (tmp_path / "log").mkdir()
    return path


def begin(job: Path) -> Any:
    log = str(job.parent / "log")
    return start_driver(
        "run", str(job), "--json", **{"BATCHRUN_TEST_LOG": log, STEP: "0.02", SLOW: str(job.parent / "slow")}
    )


def generated(job: Path) -> Counter[str]:
    """How often each row was, by its seed."""
    lines = [line for file in (job.parent / "log").iterdir() for line in file.read_text().splitlines()]
    return Counter(line.split()[2] for line in lines if " row " in line)


def check(job: Path) -> dict[str, Any]:
    """The output is whole and nothing is left over; the record's counters."""
    out = job.parent / "out"
    table = pa.concat_tables([pq.read_table(file) for file in sorted((out / "data").iterdir())])
    assert table["text"].to_pylist() == pq.read_table(job.parent / "in.parquet")["text"].to_pylist()
    assert table["answer"].to_pylist() == table["text"].to_pylist()
    assert not [file for file in (out / "_job/stage").rglob("*") if file.is_file()]
    record = json.loads(max((out / "_job/runs").glob("*.json")).read_text())
    counts: dict[str, Any] = record["counts"]
    return counts


def test_a_worker_with_nothing_to_do_takes_over_rows_and_each_is_generated_once(job):
    process = begin(job)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    counts = check(job)
    assert counts["handed_over"] > 0
    assert set(generated(job).values()) == {1}
    assert len(generated(job)) == PARTS * ROWS
    assert counts["rows"] == PARTS * ROWS
    assert (counts["commits"], json.loads(out)["parts"]) == (PARTS, PARTS)


def test_a_worker_that_is_killed_in_the_tail_costs_rows_that_were_not_staged_and_nothing_else(job):
    process = begin(job)
    wait_until(lambda: sum(generated(job).values()) > PARTS * ROWS * 0.7, process)
    engines = [one for one in psutil.process_iter(["cmdline"]) if is_engine_of(one, process.pid)]
    assert len(engines) == 2
    # The worker that is its parent goes with it.
    worker = engines[0].ppid()
    os.kill(worker, signal.SIGKILL)
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    check(job)
    twice = sum(count - 1 for count in generated(job).values())
    # What was in its engine and what waited to be staged, of two tasks.
    assert twice <= 16 + 2 * 2 * 20


def is_engine_of(process: psutil.Process, driver: int) -> bool:
    words = process.info["cmdline"] or []
    return "batchrun.engine.server" in words and any(one.pid == driver for one in process.parents())
