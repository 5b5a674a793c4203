"""Start and end of a run: what overlaps, what is spared, and when it comes how far."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import psutil
import pytest

from batchrun.counters import Counters
from batchrun.driver import recorder
from batchrun.driver import workers as worker_views
from batchrun.driver.engines import standing_by
from batchrun.driver.prepare import look
from batchrun.driver.run import run
from batchrun.driver.workers import Workers
from batchrun.engine.processes.standby import Standby
from batchrun.engine.protocol import EngineSpec, EngineStats
from batchrun.errors import BatchrunError, Refused, StorageError
from batchrun.model import light
from batchrun.storage import Folder
from batchrun.telemetry import record
from batchrun.telemetry.milestones import NAMES, Milestones
from batchrun.telemetry.progress import Progress
from batchrun.worker import plugin
from jobs import batchrun, environment, load, start_program, wait_until, write_job

PADDED = {"kind": "padded"}


def engines_of(driver: int) -> list[int]:
    """Engines' processes that this driver has started itself."""
    found = []
    for process in psutil.process_iter(["cmdline", "status"]):
        words = process.info["cmdline"] or []
        if words[1:3] == ["-m", "batchrun.engine.server"] and words[4] == str(driver):
            found.append(process.pid)
    return found


def test_a_run_tells_when_it_came_how_far_counted_from_the_command(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    began = time.time()
    code, out, err = batchrun("run", str(job), "--json")
    assert code == 0, err
    found = json.loads(out)["milestones"]
    assert list(found) == list(NAMES)
    assert 0 < found["imported"] < found["engine ready"] < found["first row"] < found["last row"]
    # In hundredths of a second, as the record has them.
    assert found["last row"] <= found["last commit"] <= found["manifest"] <= found["report"]
    assert found["report"] < time.time() - began + 0.05
    (run,) = record.read_all(Folder(str(tmp_path / "out")))
    assert run.milestones == {name: at for name, at in found.items() if name != "report"}


def test_an_engine_that_worked_before_the_run_gives_it_no_milestone_of_its_own_start():
    milestones = Milestones(started=1000.0)
    old = {"engine started": 900.0, "engine ready": 910.0, "first row": 911.0, "last row": 1030.0}
    milestones.see_engines([EngineStats(times=old)])
    assert milestones.seconds == {"last row": 30.0}
    milestones.see_engines(
        [EngineStats(times={"engine ready": 1020.0, "first row": 1021.0, "last row": 1025.0})]
    )
    assert milestones.seconds == {"engine ready": 20.0, "first row": 21.0, "last row": 30.0}


def test_a_local_cluster_starts_while_the_prompt_is_tried_and_ends_with_a_refused_job(
    tmp_path, tiny_llama, monkeypatch
):
    prepared = look(load(write_job(tmp_path, tiny_llama)))
    opened, loading = threading.Event(), threading.Event()
    states, engines = [], []

    class Client:
        def run(self, work, engine, **how):
            engines.append(engine)
            loading.set()

    @contextmanager
    def slow_cluster(settings, standby, gpus):
        assert opened.wait(30), "nothing goes on meanwhile"
        states.append("up")
        yield Client()
        states.append("down")

    monkeypatch.setattr(worker_views, "connect", slow_cluster)
    with suppress(BatchrunError), Workers(prepared, None, Milestones()) as workers:
        workers.begin()
        opened.set()
        assert loading.wait(30)
        raise BatchrunError("refused after all")
    assert states == ["up", "down"]
    assert engines == [prepared.codec.engine]


def test_engines_start_before_the_plan_is_ready_and_are_the_workers_own(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama, rows=4, engine=PADDED, generation={"max_new_tokens": 2})
    code, out, err = batchrun("run", str(job), "--json")
    assert code == 0, err
    found = json.loads(out)["milestones"]
    assert found["engine started"] < min(found["imported"], found["planned"], found["cluster ready"])


@pytest.mark.parametrize(("end", "code"), [(signal.SIGTERM, 4), (signal.SIGINT, 4), (signal.SIGKILL, -9)])
def test_a_driver_that_ends_before_there_are_workers_leaves_no_engine(tmp_path, tiny_llama, end, code):
    process = start_program("run", str(write_job(tmp_path, tiny_llama, engine=PADDED)))
    wait_until(lambda: engines_of(process.pid), process)
    os.kill(process.pid, end)
    process.communicate(timeout=10)
    assert process.returncode == code
    # The kernel ends them; it may take a moment.
    deadline = time.monotonic() + 5
    while engines_of(process.pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not engines_of(process.pid)


def test_a_refused_job_leaves_no_engine_and_has_touched_no_gpu(tmp_path, tiny_llama, monkeypatch):
    job = load(write_job(tmp_path, tiny_llama, engine=PADDED), "input.path=nowhere.parquet")
    seen = []

    def prepare(self, model_path):
        seen.append(model_path)

    monkeypatch.setattr(Standby, "prepare", prepare)
    with standing_by(job) as processes:
        assert engines_of(os.getpid()) == [process._process.pid for process in processes] != []
        with pytest.raises(Refused):
            run(job, standby=processes)
    assert not engines_of(os.getpid())
    assert not seen


def test_engines_of_the_users_own_and_workers_elsewhere_have_nothing_standing_by(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    elsewhere = ("engine.kind=padded", "cluster.address=tcp://nowhere:8786")
    for one in (load(job), load(job, *elsewhere)):
        with standing_by(one) as processes:
            assert not processes


def test_what_cannot_be_imported_ahead_is_not_told_by_the_thread_that_tried(
    tmp_path, tiny_llama, monkeypatch
):
    tried, told = [], []

    def cannot() -> None:
        tried.append(threading.current_thread())
        raise ImportError("no such module")

    monkeypatch.setattr(threading, "excepthook", told.append)
    monkeypatch.setattr(recorder, "_import_report", cannot)
    watching = recorder.Recorder(look(load(write_job(tmp_path, tiny_llama))), "a" * 32, Milestones())
    watching.on_progress(Progress(1.0, 1, 0, 1, 10, 1, Counters(rows=1), 1))
    monkeypatch.setattr(plugin, "import_tokenizers", cannot)
    monkeypatch.setattr(plugin.worker_state, "start_engine", lambda spec: None)
    asyncio.run(plugin.start_engine(EngineSpec("echo", "nowhere", "nowhere")))
    deadline = time.monotonic() + 30
    while (len(tried) < 2 or any(t.is_alive() for t in tried)) and time.monotonic() < deadline:
        time.sleep(0.01)
    watching.end("interrupted")
    assert (len(tried), told) == (3, [])


@pytest.mark.parametrize(("ended_by", "told"), [("no space left", 0), ("no row is left", 1)])
def test_what_ended_a_run_is_no_warning_about_its_report_as_well(
    tmp_path, tiny_llama, monkeypatch, caplog, ended_by, told
):
    def is_full(*words: object) -> None:
        raise StorageError("no space left", str(tmp_path))

    # Dask turns pytest's own handlers off while a cluster is up.
    caplog.set_level("WARNING")
    monkeypatch.setattr(record, "write", is_full)
    watching = recorder.Recorder(look(load(write_job(tmp_path, tiny_llama))), "a" * 32, Milestones())
    watching.end("interrupted", ended_by)
    assert len(caplog.messages) == told


def test_nobody_elses_workers_are_asked_for_ahead(tmp_path, tiny_llama, monkeypatch):
    job = load(write_job(tmp_path, tiny_llama), "cluster.slurm={queue: gpu}")
    monkeypatch.setattr(worker_views, "refuse_unusable", lambda settings, gpus: None)
    monkeypatch.setattr(worker_views, "connect", lambda settings, standby, gpus: pytest.fail("asked for"))
    with Workers(look(job), None, Milestones()) as workers:
        workers.begin()


def test_neither_driver_nor_engine_import_what_they_do_not_use(tmp_path, tiny_llama):
    """Each second of imports is one in which a GPU is paid for and idle."""
    opening = (
        "from batchrun.model.folder import resolve; from batchrun.model.tokenizer import load_tokenizer;"
        "from batchrun.job.job import Job;"
        f"model = Job.load({str(write_job(tmp_path, tiny_llama))!r}).model;"
        "import batchrun.driver.run; load_tokenizer(resolve(model), model)"
    )
    for code, unused in (
        (opening, {"torch", "pandas", "matplotlib"}),
        ("import batchrun.worker.task", {"torch", "transformers", "pandas", "matplotlib"}),
        ("import batchrun.engine.server", {"dask", "distributed", "pyarrow", "pandas", "torch", "pydantic"}),
        ("import batchrun.cli, batchrun.driver.engines", {"numpy", "pyarrow", "distributed", "torch"}),
    ):
        said = subprocess.run(
            [sys.executable, "-c", f"import sys; {code}; print(*sys.modules)"],
            env=environment(**{light.VARIABLE: "1"}),
            capture_output=True,
            text=True,
            check=True,
        )
        assert not unused & set(said.stdout.split()), code
        assert not said.stderr
