"""Start and end of a run: what overlaps, what is spared, and when it comes how far."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress

import pytest

from batchrun.counters import Counters
from batchrun.driver import recorder
from batchrun.driver import workers as worker_views
from batchrun.driver.prepare import look
from batchrun.driver.workers import Workers
from batchrun.engine.protocol import EngineSpec, EngineStats
from batchrun.errors import BatchrunError
from batchrun.model import light
from batchrun.storage import Folder
from batchrun.telemetry import record
from batchrun.telemetry.milestones import NAMES, Milestones
from batchrun.telemetry.progress import Progress
from batchrun.worker import plugin
from jobs import batchrun, environment, load, write_job


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
    # The kernel tells a process's start from the machine's, which it knows to the second.
    assert found["report"] < time.time() - began + 1
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
    def slow_cluster(settings):
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


def test_nobody_elses_workers_are_asked_for_ahead(tmp_path, tiny_llama, monkeypatch):
    job = load(write_job(tmp_path, tiny_llama), "cluster.slurm={queue: gpu}")
    monkeypatch.setattr(worker_views, "refuse_unusable", lambda settings: None)
    monkeypatch.setattr(worker_views, "connect", lambda settings: pytest.fail("asked for"))
    with Workers(look(job), None, Milestones()) as workers:
        workers.begin()


def test_neither_driver_nor_engine_import_what_they_do_not_use(tmp_path, tiny_llama):
    """Each second of imports is one in which a GPU is paid for and idle."""
    opening = (
        "from batchrun.model.folder import load_tokenizer, resolve; from batchrun.job.job import Job;"
        f"model = Job.load({str(write_job(tmp_path, tiny_llama))!r}).model;"
        "import batchrun.driver.run; load_tokenizer(resolve(model), model)"
    )
    for code, unused in (
        (opening, {"torch", "pandas", "matplotlib"}),
        ("import batchrun.worker.task", {"torch", "transformers", "pandas", "matplotlib"}),
        ("import batchrun.engine.server", {"dask", "distributed", "pyarrow", "pandas", "torch", "pydantic"}),
        ("import batchrun.cli", {"numpy", "pyarrow", "distributed"}),
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
