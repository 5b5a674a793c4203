"""Faults of rows, engines, workers and files, with real processes: each costs what it must and nothing more."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from distributed import CancelledError, KilledWorker
from faulty_engines import SteppingEngine
from faulty_jobs import ROWS

import batchrun as library
from batchrun.commands.verify import verify
from batchrun.driver.dispatch import Dispatch
from batchrun.driver.poison_rows import STRIKES
from batchrun.driver.prepare import prepare
from batchrun.errors import BatchrunError, ExitCode, TooManyFaults
from batchrun.storage import deadline
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import silent
from batchrun.worker import plugin
from batchrun.worker.generation import AttemptCounters
from batchrun.worker.state import WorkerState
from jobs import answers, dataset, load, write_job


# Few rows for the worker, which takes seconds to come back: tests/driver/test_poison_rows.py bisects thousands.
@pytest.mark.timeout(900)
@pytest.mark.parametrize(("engine", "part"), [("EngineKiller", 4), ("WorkerKiller", 1)])
def test_a_row_that_kills_its_engine_or_worker_is_its_own_error_and_all_others_complete(
    setting, engine, part
):
    one = setting(engine, rows=2 * part, row_group=part, output={"rows_per_part": part})
    result = one.run()
    assert (result.exit_code, result.errors) == (ExitCode.FAILED_ROWS, {"WORKER_CRASH": 1})
    one.check({1: "WORKER_CRASH"})
    # A death before which other rows got done is free, so that there may be one for each of the neighbours.
    deaths = STRIKES + (part - 1).bit_length() + STRIKES + part - 1
    assert len(one.processes) <= deaths + 2
    # A death costs no more than the rows that were in the engine.
    asked = sum(len(lines) for lines in one.processes)
    assert asked <= 2 * part * (deaths + 1)


def test_an_engine_that_cannot_be_loaded_is_a_clear_error_and_no_rows_fault(setting):
    one = setting("Unloadable")
    with pytest.raises(BatchrunError, match="no row is to blame") as caught:
        one.run()
    assert "signal 9 (SIGKILL) while its model was loaded" in str(caught.value)
    assert len(one.processes) < 20
    one.job.write_text(one.job.read_text().replace("faulty_engines:Unloadable", "engines:EchoEngine"))
    one.run()
    one.check({})


def test_rows_that_all_crash_stop_the_run_instead_of_being_bisected_for_ever(setting):
    one = setting("BrokenKernel")
    with pytest.raises(TooManyFaults, match="illegal memory access"):
        one.run()
    assert len(one.processes) < 30
    assert not list((one.folder / "out/data").glob("*.parquet"))


def test_an_engine_that_hangs_alive_is_ended_and_its_rows_go_on(setting):
    one = setting("HangingEngine", limits={"stall_seconds": 10})
    one.run()
    one.check({})
    assert len(one.processes) >= 2


def test_doubtful_rows_are_tried_once_more_in_a_fresh_engine_and_then_fail(setting):
    one = setting("DoubtfulEngine", generation={"max_new_tokens": 64})
    one.run()
    one.check({4: "REPEATED_TOKEN", 5: "REPEATED_TOKEN"})
    assert len(one.processes) == 2
    again = sorted(int(line.split()[1]) for line in one.processes[1])
    assert set(again) <= {4, 5, *range(1, ROWS, 2)}
    assert len(again) == len(set(again)), "once"


def test_rows_that_fail_in_a_fresh_engine_too_cost_the_run_no_other_engine(setting):
    one = setting("RepeatingEngine", rows=40, generation={"max_new_tokens": 64}, output={"rows_per_part": 5})
    one.run()
    one.check(dict.fromkeys(range(4, 40, 5), "REPEATED_TOKEN"))
    # Partitions in flight together may each have had one of their own.
    assert len(one.processes) <= 3


def test_a_worker_told_to_leave_keeps_what_its_rows_are_so_far(setting):
    long = {"prompt": {"template": "{{ text }}" + " and so on" * 25}, "generation": {"max_new_tokens": 200}}
    one = setting("SteppingEngine", **long)
    staged = one.folder / "out/_job/stage"
    preempted: list[int] = []

    def steps(process: int) -> int:
        return sum(line.startswith("tokens") for line in one.processes[process])

    def preempt() -> None:
        """Three times in the middle of answers that take ten seconds."""
        for n in range(3):
            while len(one.processes) <= n or not steps(n):
                time.sleep(0.1)
            time.sleep(2)
            before = set(staged.rglob("*.partial"))
            told, began = steps(n), time.monotonic()
            one.cluster.run(terminate, wait=False, on_error="ignore")
            # Not their number: what another partition staged before may be swept in the meantime.
            while not set(staged.rglob("*.partial")) - before:
                assert time.monotonic() - began < 20
                time.sleep(0.05)
            preempted.append(told)

    thread = threading.Thread(target=preempt, daemon=True)
    thread.start()
    result = one.run()
    thread.join(1)
    assert len(preempted) == 3, "preempted three times"
    # An engine steps until all is staged, the more slowly the busier the machine is: its steps are the clock.
    went_on = [steps(n) - told for n, told in enumerate(preempted)]
    assert max(went_on) * SteppingEngine.STEP < 5, went_on
    assert result.ok == ROWS
    table = answers(one.folder / "out")
    expected = [(text + " and so on" * 25)[:200] for text in dataset(ROWS)["text"].to_pylist()]
    assert table["answer"].to_pylist() == expected
    lines = [line for process in one.processes for line in process]
    assert any(line.split()[-1] != "0" for line in lines if " from " in line), "rows went on"
    generated = sum(int([x for x in p if x.startswith("tokens")][-1].split()[1]) for p in one.processes)
    twice = generated - sum(table["output_tokens"].to_pylist())
    print(f"{twice} tokens generated twice in 3 preemptions, {went_on} steps each until they were staged")
    assert twice <= 3 * ROWS * 8
    assert not list(staged.rglob("*")) or not [f for f in staged.rglob("*") if f.is_file()], "swept"


async def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


@pytest.mark.parametrize("order", [None, "prefix"])
def test_a_damaged_page_costs_its_rows_and_a_second_reading(tmp_path, tiny_llama, cluster, order):
    rows = 3000
    table = pa.table({"id": range(rows), "text": [f"row {i} " * 9 for i in range(rows)]}).cast(
        pa.schema([pa.field("id", pa.int64(), nullable=False), pa.field("text", pa.string())])
    )
    source, output = {"path": "in.parquet", "order": order}, {"rows_per_part": 1000, "row_column": "source"}
    job = write_job(tmp_path, tiny_llama, input=source, output=output, limits={"max_error_rate": 1.0})
    file = tmp_path / "in.parquet"
    pq.write_table(
        table, file, row_group_size=1000, write_page_checksum=True, compression="none", use_dictionary=False,
        data_page_size=4096, write_batch_size=50,
    )  # fmt: skip
    column = pq.read_metadata(file).row_group(1).column(1)
    data = bytearray(file.read_bytes())
    data[column.data_page_offset + column.total_compressed_size // 2] ^= 1
    file.write_bytes(data)
    result = library.run(load(job), client=cluster)
    found = answers(tmp_path / "out")
    names = [int(name.removeprefix("in.parquet:")) for name in found["source"].to_pylist()]
    found = found.take(np.argsort(names))
    errors = found["error"].to_pylist()
    lost = [i for i, error in enumerate(errors) if error]
    assert result.errors == {"INPUT_CORRUPT": len(lost)}
    assert lost == list(range(lost[0], 2000))
    assert 1300 < lost[0] < 1600, "what stands before the page is read"
    ids = found["id"].to_pylist()
    assert ids == [None if i in set(lost) else i for i in range(rows)]
    assert np.all([errors[i].startswith("INPUT_CORRUPT: ") for i in lost])
    assert verify(load(job)).found.passed


@pytest.mark.parametrize(
    "gone",
    [
        KilledWorker("task", SimpleNamespace(address="tcp://gone"), 0),
        CancelledError("task"),
        OSError("closed"),
    ],
)  # type: ignore[arg-type]
def test_a_task_whose_receipts_left_with_its_worker_is_done_again(tmp_path, tiny_llama, gone):
    """Dask calls it finished, and then begins it anew, or cannot: the worker was told to leave meanwhile."""

    class Finished:
        key, status = "task", "finished"

        def result(self, timeout: float) -> None:
            raise gone

    prepared = prepare(load(write_job(tmp_path, tiny_llama)))
    dispatch = Dispatch(prepared, {1: 20}, threading.Event(), silent, Milestones())
    future: Any = Finished()
    dispatch.partitions.todo.clear()
    dispatch.in_flight[future] = [1]
    dispatch._take(future)
    assert list(dispatch.partitions.todo) == [1]
    assert not dispatch.in_flight


def test_a_receipt_that_left_with_its_worker_is_not_waited_for_beyond_a_stop(tmp_path, tiny_llama, caplog):
    """Dask begins the task anew meanwhile, which may take as long as the partition did."""
    # Dask turns pytest's own handlers off while a cluster is up.
    caplog.set_level("WARNING")
    stop, done = threading.Event(), threading.Event()

    class BegunAnew:
        key, status = "task", "finished"

        def result(self, timeout: float) -> None:
            stop.set()
            done.wait(timeout)

    prepared = prepare(load(write_job(tmp_path, tiny_llama)))
    dispatch = Dispatch(prepared, dict.fromkeys(range(3), 20), stop, silent, Milestones())
    dispatch.partitions.todo.clear()
    began = time.monotonic()
    with deadline.until(stop.is_set):
        for i in range(3):
            future: Any = BegunAnew()
            dispatch.in_flight[future] = [i]
            dispatch._take(future)
    done.set()
    assert time.monotonic() - began < 5
    assert list(dispatch.partitions.todo) == [0, 1, 2], "the run is not complete"
    assert not caplog.messages, "nobody is to blame"


def test_a_stop_takes_no_longer_the_more_receipts_left_with_their_workers(tmp_path, tiny_llama):
    """As where all processes are told to end: each receipt cost half a second on top of two for the first."""
    done = threading.Event()

    class Left:
        key = "task"

        def __init__(self, status: str) -> None:
            self.status = status

        def result(self, timeout: float) -> None:
            done.wait(timeout)

    client: Any = SimpleNamespace(
        status="running", run=lambda *words, **how: done.wait(30), cancel=lambda futures: None
    )
    stop = threading.Event()
    dispatch = Dispatch(prepare(load(write_job(tmp_path, tiny_llama))), {1: 20}, stop, silent, Milestones())
    stop.set()
    for status in ["finished"] + 15 * ["lost"]:
        future: Any = Left(status)
        dispatch.in_flight[future] = [1]
        dispatch.finished.put(future)
    began = time.monotonic()
    with deadline.until(stop.is_set):
        dispatch._drain(client)
    done.set()
    assert time.monotonic() - began < 5


def test_a_stop_does_not_wait_for_a_worker_that_does_not_hear_of_it(tmp_path, tiny_llama):
    over = threading.Event()
    client: Any = SimpleNamespace(
        status="running",
        run=lambda *words, **how: over.wait(30),
        scheduler=SimpleNamespace(identity=lambda n_workers: {"workers": {}}),
        sync=lambda call, callback_timeout, **words: call(**words),
        cancel=lambda futures: None,
    )
    prepared = prepare(load(write_job(tmp_path, tiny_llama)))
    dispatch = Dispatch(prepared, {1: 20}, threading.Event(), silent, Milestones())
    dispatch.in_flight[cast(Any, "future")] = [1]
    began = time.monotonic()
    dispatch._drain(client)
    over.set()
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(("doing", "holds"), [("reading", False), ("generating", True), ("sealing", True)])
def test_a_stop_waits_for_attempts_that_may_hold_answers_and_for_no_tokenizer(
    tmp_path, tiny_llama, monkeypatch, doing, holds
):
    prepared = prepare(load(write_job(tmp_path, tiny_llama)))
    dispatch = Dispatch(prepared, {1: 20}, threading.Event(), silent, Milestones())
    dispatch.in_flight[cast(Any, "future")] = [1]
    attempt = AttemptCounters(run=dispatch.order.run, partition=1, doing=doing)
    told = {"tasks": [asdict(attempt)], "engines": [], "loading": 0, "rendered": 0, "gpu": None}
    worker = {"metrics": {"batchrun": told}, "host": "here", "nthreads": 1}
    client: Any = SimpleNamespace(
        scheduler=SimpleNamespace(identity=lambda n_workers: {"workers": {"tls://here": worker}}),
        sync=lambda call, callback_timeout, **words: call(**words),
    )
    assert dispatch._holding(client) is holds
    # The same on a worker that is told to leave.
    monkeypatch.setattr(plugin, "FLUSH_ON_EXIT", 0.5)
    monkeypatch.setattr(plugin, "worker_state", WorkerState())
    monkeypatch.setitem(plugin.worker_state._attempts, 1, attempt)
    began = time.monotonic()
    asyncio.run(plugin._stop_work())
    assert (time.monotonic() - began >= 0.5) is holds
