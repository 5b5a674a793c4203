"""An engine that always fails ends its run soon and says why; one that fails on some rows or one machine does not."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from batchrun.cluster import connect
from batchrun.commands.clean import clean
from batchrun.commands.status import status
from batchrun.engine.processes.last_words import LINES
from batchrun.errors import EngineDied, ExitCode, TooManyFaults
from batchrun.job.settings import ClusterSettings
from batchrun.report import page
from batchrun.storage import Folder
from batchrun.telemetry import engine_log
from batchrun.telemetry.redact import Redactor
from batchrun.worker.engine_health import LOADS, EngineHealth
from jobs import batchrun, load

CUDA = "CUDA error: an illegal memory access was encountered"


def starts_by_worker(one) -> Counter[str]:
    place = Path(tempfile.gettempdir()) / f"batchrun-notes-{one.name}"
    return Counter(file.name.split("-")[1] for file in place.iterdir())


def test_an_engine_that_always_fails_ends_the_run_within_three_loads_with_its_own_error(setting):
    one = setting("AbortingEngine", rows=60, output={"rows_per_part": 8})
    code, _, err = batchrun("run", str(one.job))
    assert code == ExitCode.FAILED, err
    assert len(one.processes) == LOADS
    last = err.strip().splitlines()[-1]
    assert CUDA in last
    assert "signal 6 (SIGABRT)" in last
    assert not any(noise in err for noise in ("frame #", "what()", "Exception raised", "terminate called"))
    assert "_job/runs/" in last


def test_what_a_dead_engine_printed_is_beside_the_runs_record_and_every_command_knows_it(setting):
    one = setting("AbortingEngine", rows=60)
    with pytest.raises(TooManyFaults) as caught:
        one.run()
    found = status(load(one.job))
    (run,) = found.runs
    assert run.outcome == "failed"
    assert len(run.engine_logs) == LOADS
    assert run.engine_logs[-1] in str(caught.value)
    assert run.engine_logs[-1] in run.message
    folder = Folder(str(one.folder / "out"))
    for key in run.engine_logs:
        title, _, *lines = folder.read(key).decode().splitlines()
        assert CUDA in title
        assert len(lines) == LINES
        assert lines[-1].startswith("frame #24: Py_RunMain")
    assert any(run.engine_logs[0] in line for line in found.lines())
    assert run.engine_logs[0] in page.render(page.Facts.read(load(one.job)))
    assert clean(load(one.job)) == []
    assert set(clean(load(one.job), everything=True)) >= set(run.engine_logs)


def test_a_run_after_engines_that_died_completes_and_verifies_beside_their_logs(setting):
    one = setting("AbortingEngine")
    with pytest.raises(TooManyFaults):
        one.run()
    one.job.write_text(one.job.read_text().replace("faulty_engines:AbortingEngine", "engines:EchoEngine"))
    one.run()
    one.check({})
    assert [len(run.engine_logs) for run in status(load(one.job)).runs] == [LOADS, 0]


def test_an_engine_that_fails_for_good_in_the_midst_of_a_run_ends_it_within_three_more_loads(setting):
    one = setting("LateAbortingEngine", rows=60, row_group=4, output={"rows_per_part": 4})
    with pytest.raises(TooManyFaults, match=CUDA):
        one.run()
    assert 1 < len(one.processes) <= 1 + LOADS


@pytest.mark.parametrize("rows", [16, 2])
def test_a_row_that_kills_its_engine_before_any_row_is_finished_is_still_found(setting, rows):
    one = setting("WindowKiller", rows=rows, row_group=8, output={"rows_per_part": 8})
    assert one.run().errors == {"WORKER_CRASH": 1}
    one.check({1: "WORKER_CRASH"})


def test_a_row_that_is_left_alone_in_the_last_partition_is_still_found(setting):
    one = setting("WindowKiller", rows=2, row_group=1, output={"rows_per_part": 1})
    assert one.run().errors == {"WORKER_CRASH": 1}
    one.check({1: "WORKER_CRASH"})


@pytest.mark.parametrize(("engine", "completes"), [("BadMachineEngine", True), ("AbortingEngine", False)])
def test_a_bad_machine_is_given_no_more_work_and_ends_only_a_run_that_no_other_can_do(
    setting, engine, completes
):
    one = setting(engine, rows=60, row_group=4, output={"rows_per_part": 4})
    with connect(ClusterSettings(workers=2)) as one.cluster:
        if completes:
            assert one.run().ok == 60
        else:
            with pytest.raises(TooManyFaults, match="on each of 2 workers"):
                one.run()
    starts = starts_by_worker(one)
    assert len(starts) == 2
    assert max(starts.values()) == LOADS
    if completes:
        assert min(starts.values()) == 1
        one.check({})


def died(launch: int) -> EngineDied:
    error = EngineDied(CUDA)
    error.launch = launch
    return error


def test_a_death_counts_once_for_all_its_tasks_and_not_at_all_after_a_durable_row(tmp_path):
    health = EngineHealth("run", Folder(str(tmp_path)), ["hunter2"])

    def end(launch: int, counts: bool = True) -> int:
        return health.ended(died(launch), "worker", counts).fruitless

    assert [end(1), end(1), end(2)] == [1, 1, 2]
    health.progress(3)
    assert [end(3), end(3), end(4, counts=False), end(5), end(6)] == [0, 0, 0, 1, 2]
    health.check()
    assert end(7) == LOADS
    with pytest.raises(EngineDied, match=f"worker: {CUDA}.*engine-7.log") as caught:
        health.check()
    assert caught.value.refused
    assert len(engine_log.keys(Folder(str(tmp_path)), "run")) == 7
    assert health.ended(EngineDied("the engine was stopped"), "worker").fruitless == LOADS


def test_an_engine_in_doubt_is_tried_with_another_row_each_time(tmp_path):
    health = EngineHealth("run", Folder(str(tmp_path)), [])
    whole, half = np.ones(4, bool), np.array([1, 1, 1, 0], bool)
    tried = [int(np.flatnonzero(health.one_of(0, rows))[0]) for rows in (whole, half, half)]
    assert len({*tried}) == 3
    health.progress(1)
    assert np.flatnonzero(health.one_of(0, whole)) == tried[0]


def test_logs_are_redacted_and_bounded_in_number(tmp_path):
    folder, redact = Folder(str(tmp_path)), Redactor()
    redact.add(["hunter2"])
    keys = [engine_log.save(folder, "0123456789", "died", [f"key hunter2 {i}"], redact) for i in range(25)]
    assert keys[0] == "_job/runs/01234567-engine-1.log"
    assert len({*keys} - {""}) == engine_log.MOST
    assert keys[engine_log.MOST :] == [""] * 5
    assert engine_log.keys(folder, "0123456789") == keys[: engine_log.MOST]
    assert folder.read(keys[3]).decode() == "died\n\nkey *** 3\n"
