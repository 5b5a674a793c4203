"""An engine's process that stands by: handed over to a worker, and gone with either of the two."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import psutil
import pytest

from batchrun.engine.processes import standby
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.processes.standby import VARIABLE, Standby, adopt
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.errors import EngineDied, EngineNotLoaded
from jobs import environment

KIND = "fake_engines:ObeyingEngine"
SPEC = EngineSpec(KIND, "the-model", "the-tokenizer")


@pytest.fixture
def waiting() -> Iterator[Standby]:
    with Standby(KIND, {}) as process:
        yield process


def tokens_of(engine: EngineProcess) -> list[int]:
    request = Request(0, np.array([5, 6, 7], np.int32), 8)
    (answer,) = [one for one in engine.generate(iter([request])) if one is not None]
    return answer.token_ids.tolist()


def ended(pid: int, seconds: float = 20.0) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.02)
    return False


def python(code: str, **env: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code], env=environment(**env), stdout=subprocess.PIPE, text=True
    )


def test_a_worker_takes_the_process_that_stands_by_for_it_and_starts_its_own_after_that_one(
    waiting, monkeypatch
):
    monkeypatch.setenv(VARIABLE, waiting.name)
    engine = EngineProcess(SPEC)
    waiting.prepare("the-model")
    expected = tokens_of(engine)
    first = engine.pid
    assert first == waiting._process.pid
    assert VARIABLE not in os.environ
    # It counts from when the process was started, not from when it was handed over.
    assert engine.stats().times["engine started"] == waiting._began
    engine.stop()
    assert ended(first)
    assert tokens_of(engine) == expected
    assert engine.pid != first
    engine.stop()


def test_a_worker_starts_its_own_process_where_the_one_that_stood_by_is_gone(monkeypatch):
    with Standby(KIND, {}) as gone:
        pass
    assert ended(gone._process.pid)
    monkeypatch.setenv(VARIABLE, gone.name)
    engine = EngineProcess(SPEC)
    assert tokens_of(engine)
    engine.stop()


def test_a_process_that_stood_by_tells_what_it_ended_with(waiting, monkeypatch):
    monkeypatch.setenv(VARIABLE, waiting.name)
    engine = EngineProcess(SPEC)
    tokens_of(engine)
    os.kill(engine.pid, signal.SIGKILL)
    with pytest.raises(EngineDied, match=r"signal 9 \(SIGKILL\)"):
        tokens_of(engine)


def test_its_output_from_before_it_was_handed_over_is_kept(monkeypatch):
    with Standby("no.such.module:Engine", {"PYTHONVERBOSE": "1"}) as waiting:
        # Python tells of every import, so that the process has said something by then.
        deadline = time.monotonic() + 30
        while not waiting._process.stdout.peek(1) and time.monotonic() < deadline:
            time.sleep(0.05)
        monkeypatch.setenv(VARIABLE, waiting.name)
        connection, adopted = adopt()
        try:
            os.set_blocking(adopted.stdout.fileno(), True)
            assert b"import " in adopted.stdout.read(4096)
        finally:
            connection.close()
            adopted.kill()


def test_a_process_that_stands_by_ends_with_whoever_started_it():
    code = f"""
from batchrun.engine.processes.standby import Standby
import time
with Standby({KIND!r}, {{}}) as process:
    print(process._process.pid, flush=True)
    time.sleep(60)
"""
    driver = python(code)
    pid = int(driver.stdout.readline())
    assert psutil.pid_exists(pid)
    driver.kill()
    driver.communicate()
    assert ended(pid)


def test_a_process_that_was_handed_over_ends_with_its_worker(waiting):
    code = """
from batchrun.engine.processes.standby import adopt
import time
connection, process = adopt()
print(process.pid, flush=True)
time.sleep(60)
"""
    worker = python(code, **{VARIABLE: waiting.name})
    assert int(worker.stdout.readline()) == waiting._process.pid
    worker.kill()
    worker.communicate()
    assert waiting._process.wait(20) == -signal.SIGKILL


def test_another_users_worker_gets_no_process(waiting, monkeypatch):
    monkeypatch.setattr(standby.os, "getuid", lambda: 12345)
    monkeypatch.setenv(VARIABLE, waiting.name)
    assert adopt() is None
    assert waiting._process.poll() is None


def test_an_engine_that_fails_to_load_says_so_from_a_process_that_stood_by(monkeypatch):
    wrong = EngineSpec("fake_engines:BrokenEngine", "the-model", "the-tokenizer")
    with Standby(KIND, {}) as waiting:
        monkeypatch.setenv(VARIABLE, waiting.name)
        engine = EngineProcess(wrong)
        with pytest.raises(EngineNotLoaded) as told:
            tokens_of(engine)
        assert engine.pid == waiting._process.pid
        assert told.value.launch == 1
