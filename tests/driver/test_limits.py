"""A run's own limits: it stops cleanly, says which limit and how to go on, and goes on."""

from __future__ import annotations

import time
from datetime import UTC, datetime, timedelta

import pytest

import batchrun as library
from batchrun.counters import Counters
from batchrun.driver.limits import Limits
from batchrun.driver.prepare import prepare
from batchrun.driver.recorder import Recorder
from batchrun.errors import ExitCode, Interrupted, JobError
from batchrun.job.durations import parse_deadline, parse_duration
from batchrun.job.job import Job
from batchrun.telemetry import record
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import Progress
from jobs import batchrun, check_complete, load, write_job

NOW = datetime(2026, 1, 31, 12, 0, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30m", 1800), ("6h", 21600), ("1d", 86400), ("1h30m", 5400)]
)
def test_durations_are_read(text, seconds):
    assert parse_duration(text) == timedelta(seconds=seconds)
    assert parse_deadline(text, NOW) == NOW + timedelta(seconds=seconds)


def test_a_time_with_an_offset_is_that_moment_and_without_one_the_machines():
    assert parse_deadline("2026-01-31T13:00+01:00", NOW) == NOW
    assert parse_deadline("2026-01-31T13:00", NOW) == datetime(2026, 1, 31, 13).astimezone()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("limits.deadline=soon", "neither a duration such as 6h nor a time"),
        ("limits.deadline=h", "neither"),
        ("limits.max_cost=5", "needs cluster.price_per_gpu_hour"),
        ("limits.max_rows=0", "limits.max_rows"),
    ],
)
def test_a_limit_that_cannot_hold_is_refused(tmp_path, tiny_llama, change, says):
    with pytest.raises(JobError, match=says):
        load(write_job(tmp_path, tiny_llama), change)


def test_a_wrong_value_is_shown_once(tmp_path, tiny_llama):
    with pytest.raises(JobError, match=r"limits\.deadline: 'soon' is neither") as caught:
        load(write_job(tmp_path, tiny_llama), "limits.deadline=soon")
    assert str(caught.value).count("soon") == 1


def progress(seconds: float, workers: int, rows: int = 0, left: int = 1) -> Progress:
    return Progress(
        seconds=seconds,
        partitions=3,
        partitions_done=3 - left,
        partitions_in_flight=left,
        rows=100,
        rows_done=rows,
        counts=Counters(rows=rows, requests=rows, prompt_tokens=10 * rows, output_tokens=5 * rows),
        workers=workers,
        worker_time={"generating": seconds * workers},
    )


def test_a_runs_record_keeps_its_workers_time_apart_from_other_runs(tmp_path, tiny_llama):
    prepared = prepare(load(write_job(tmp_path, tiny_llama)))
    for run, seen in (
        ("a" * 32, [progress(10.0, 2), progress(15.0, 4, rows=7), progress(20.0, 3, rows=20)]),
        ("b" * 32, [progress(3.0, 1)]),
    ):
        recorder = Recorder(prepared, run, Milestones())
        for now in seen:
            recorder.on_progress(now)
        recorder.end("interrupted")
    first, second = sorted(record.read_all(prepared.folder), key=lambda one: one.run)
    assert first.worker_seconds == 60.0
    assert (first.counts.rows, first.counts.prompt_tokens, first.counts.output_tokens) == (20, 200, 100)
    assert second.worker_seconds == 3.0


def test_money_is_counted_over_hours_of_workers_of_all_runs(tmp_path, tiny_llama):
    path = write_job(tmp_path, tiny_llama)
    job = load(path, "limits.max_cost=5", "cluster.price_per_gpu_hour=2.5")
    limits = Limits(job, 3600.0)
    limits.on_progress(progress(1799.0, 2))
    with pytest.raises(Interrupted, match=r"limits.max_cost \(2.00 GPU hours cost 5.00"):
        limits.on_progress(progress(1800.0, 2))
    limits.on_progress(progress(9000.0, 2, left=0))


SLOW = {"kind": "engines:SecondsEngine"}


@pytest.mark.parametrize("limit", ["limits.max_rows=8", "limits.deadline=4s"])
def test_a_run_stops_at_its_limit_with_its_rows_staged_and_goes_on_without_it(
    tmp_path, tiny_llama, cluster, limit
):
    job = write_job(tmp_path, tiny_llama, engine=SLOW)
    name = limit.partition("=")[0]
    with pytest.raises(Interrupted, match=f"stopped by {name} ") as caught:
        library.run(load(job, limit), client=cluster)
    assert caught.value.exit_code == ExitCode.INTERRUPTED
    assert f"raise {name} or leave it out" in str(caught.value)
    assert "of 60 rows are safe" in str(caught.value)
    result = library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    assert 0 < result.requests < 60, "what was staged is not generated again"
    check_complete(tmp_path / "out", 60)


def test_money_that_earlier_runs_spent_stops_the_next_one_before_it_has_workers(
    tmp_path, tiny_llama, cluster
):
    job = write_job(
        tmp_path, tiny_llama, engine=SLOW, cluster={"price_per_gpu_hour": 3600.0}, limits={"max_cost": 3.0}
    )
    with pytest.raises(Interrupted, match="max_cost"):
        library.run(load(job), client=cluster)
    started = time.monotonic()
    code, out, err = batchrun("run", str(job), "--json")
    assert code == 4, err
    assert "stopped by limits.max_cost" in out
    assert "or leave it out" in out
    assert time.monotonic() - started < 60
    spent = sum(run.worker_seconds for run in record.read_all(prepare(load(job)).folder))
    assert spent >= 3.0
    result = library.run(load(job, "limits.max_cost=1e9", "engine.kind=engines:EchoEngine"), client=cluster)
    assert result.ok == 60
    check_complete(tmp_path / "out", 60)


def test_a_limit_decides_no_answer(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    plain: Job = load(job)
    limited = load(job, "limits.max_rows=5", "limits.deadline=6h", "cluster.price_per_gpu_hour=2")
    assert plain.deciding() == limited.deciding()
