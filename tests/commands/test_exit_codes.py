"""The exit code is about the data: not about who reads the terminal, nor about when a mistake is found."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import typer
from distributed import Client
from typer.testing import CliRunner

import batchrun as library
from batchrun import signals
from batchrun.cli import app
from batchrun.commands.reply import replying
from batchrun.driver.notify import _failure
from batchrun.driver.recorder import _outcome
from batchrun.errors import ExitCode, Incomplete, InputError, JobError
from batchrun.report.result import RunResult
from batchrun.storage import NotFound
from batchrun.storage.protocols import refuse_unknown
from jobs import batchrun, environment, load, write_job

NO_CREDENTIALS = {
    "AWS_EC2_METADATA_DISABLED": "true",
    "AWS_SHARED_CREDENTIALS_FILE": "/none",
    "AWS_CONFIG_FILE": "/none",
}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, cluster: Client) -> Path:
    """A job whose output is complete, some rows failed."""
    job = write_job(tmp_path_factory.mktemp("finished"), tiny_llama, rows=20, prompt={"template": "{{ id }}"})
    assert library.run(load(job, "limits.max_error_rate=1"), client=cluster).exit_code == ExitCode.FAILED_ROWS
    return job


def run_again(job: Path, stdout: int, stderr: int) -> int:
    """The exit code of a run that has nothing left to do but to tell so."""
    words = [sys.executable, "-m", "batchrun", "run", str(job)]
    return subprocess.run(words, stdout=stdout, stderr=stderr, env=environment(), timeout=60).returncode


def closed_pipe() -> int:
    """A pipe that nobody reads."""
    read, write = os.pipe()
    os.close(read)
    return write


@pytest.mark.parametrize("stream", ["stdout", "both"])
@pytest.mark.parametrize("broken", ["pipe", "full"])
def test_a_complete_run_that_cannot_be_shown_has_its_own_code(finished, stream, broken):
    descriptor = closed_pipe() if broken == "pipe" else os.open("/dev/full", os.O_WRONLY)
    try:
        stderr = descriptor if stream == "both" else subprocess.DEVNULL
        assert run_again(finished, descriptor, stderr) == ExitCode.FAILED_ROWS
    finally:
        os.close(descriptor)


@pytest.mark.parametrize("closed", [">&-", "<&- >&- 2>&-"])
def test_a_closed_stream_changes_nothing_else(tmp_path, closed):
    command = f"exec {sys.executable} -m batchrun status {tmp_path}/none.yaml --json {closed}"
    ran = subprocess.run(command, shell=True, capture_output=True, text=True, env=environment())
    assert ran.returncode == ExitCode.REFUSED, ran.stderr
    assert ran.stderr.count("\n") == ("2>&-" not in closed), ran.stderr
    assert ran.stdout.count("\n") == (">&-" not in closed.replace("2>&-", "")), ran.stdout


@pytest.mark.parametrize("fails", [False, True])
def test_with_json_nothing_but_the_object_is_on_standard_output(fails):
    """Whoever prints: Python, in any thread, a library in C, a child process, or something at the very end."""
    program = f"""if True:
        import atexit, os, subprocess, sys, threading
        from batchrun.commands import init
        from batchrun.errors import InputError
        def noisy(*_):
            other = threading.Thread(target=print, args=["python"])
            other.start()
            other.join()
            os.write(1, b"library\\n")
            subprocess.run(["echo", "child"], check=True)
            atexit.register(print, "exit")
            if {fails}:
                raise InputError("no file", "data", "give one")
            return []
        init.init = noisy
        sys.argv = ["batchrun", "init", "data", "--json"]
        from batchrun.__main__ import main
        main()
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert list(json.loads(ran.stdout)) == (["status", "exit_code", "error"] if fails else ["written"])
    assert {"python", "library", "child", "exit"} <= set(ran.stderr.splitlines())


def test_a_part_that_the_store_does_not_show_yet_is_no_failure_of_the_run(finished, monkeypatch):
    def stale(result: RunResult, rows: int) -> None:
        raise NotFound("data/part-00000")

    monkeypatch.setattr(RunResult, "sample", stale)
    ran = CliRunner().invoke(app, ["run", str(finished)])
    assert ran.exit_code == ExitCode.FAILED_ROWS
    assert "of 20 rows answered" in ran.stdout


def test_missing_parts_at_the_end_are_made_by_the_same_command():
    assert Incomplete.exit_code == ExitCode.INTERRUPTED


@pytest.mark.parametrize("key", ["input.path", "output.path", "model.name"])
def test_an_unknown_protocol_is_refused(key, tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    with pytest.raises(JobError, match="s4://lake/x: no protocol s4://, did you mean 's3'") as caught:
        load(job, f"{key}=s4://lake/x")
    assert caught.value.exit_code == ExitCode.REFUSED


def test_missing_credentials_are_refused(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    code, _, err = batchrun("run", str(job), "--set", "output.path=s3://lake/x", **NO_CREDENTIALS)
    assert code == ExitCode.REFUSED
    assert err.count("\n") == 1
    assert "check the credentials" in err


def test_a_missing_library_is_told_with_its_name_before_anything_heavy_is_imported(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama, output={"path": "s3://lake/x"})
    program = (
        "import importlib.util as u, sys\n"
        "known = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 's3fs' else known(name, *more)\n"
        f"sys.argv = ['batchrun', 'run', {str(job)!r}]\n"
        "import atexit\n"
        "heavy = {'torch', 'distributed', 'transformers', 'pyarrow'}\n"
        "atexit.register(lambda: print(sorted(heavy & set(sys.modules))))\n"
        "from batchrun.__main__ import main\n"
        "main()\n"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (ran.returncode, ran.stdout) == (ExitCode.REFUSED, "[]\n")
    assert ran.stderr == "error: s3://lake/x: s3:// needs the package s3fs; pip install s3fs\n"


def test_chained_protocols_are_looked_at_one_by_one():
    refuse_unknown("simplecache::memory://lake/x", JobError)
    with pytest.raises(JobError, match="no protocol s4://"):
        refuse_unknown("simplecache::s4://lake/x", JobError)


def test_whatever_breaks_after_a_stop_is_the_stop(monkeypatch, capsys):
    stop = threading.Event()
    monkeypatch.setattr(signals, "stop", stop)
    for stopped, code in ((False, ExitCode.FAILED), (True, ExitCode.INTERRUPTED)):
        if stopped:
            stop.set()
        with pytest.raises(typer.Exit) as ended, replying(as_json=False, debug=False):
            raise AttributeError("partially initialized module 'pandas' has no attribute 'plotting'")
        assert ended.value.exit_code == code
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")


@pytest.mark.parametrize("resumable", [True, False])
def test_only_a_command_that_goes_on_says_so_when_it_is_stopped(monkeypatch, capsys, resumable):
    monkeypatch.setattr(signals, "stop", threading.Event())
    monkeypatch.setattr(signals, "safe", "")
    with pytest.raises(typer.Exit), replying(False, False, resumable=resumable):
        raise KeyboardInterrupt
    once = capsys.readouterr().err
    assert once == ("stopped; the same command goes on from there\n" if resumable else "stopped\n")
    told: list[str] = []
    monkeypatch.setattr(signals, "_say", told.append)
    monkeypatch.setattr(signals.os, "_exit", sys.exit)
    monkeypatch.setattr(signals, "_stopped_at", 0.0)
    signals.stop.set()
    with pytest.raises(SystemExit) as second:
        signals._handle(signal.SIGTERM, None)
    assert second.value.code == ExitCode.INTERRUPTED
    safe = ": what is staged is safe; the same command goes on from there"
    assert told == [f"stopped at once{safe if resumable else ''}"]


def test_a_program_is_told_once_also_of_a_stop_at_once(monkeypatch, capsys):
    monkeypatch.setattr(signals, "stop", threading.Event())
    monkeypatch.setattr(signals.os, "_exit", sys.exit)
    monkeypatch.setattr(signals, "_stopped_at", 0.0)

    def stop_twice(said: dict[str, int]) -> None:
        with replying(as_json=True, debug=False) as reply:
            if said:
                reply.print(said, [])
            signals.stop.set()
            signals._handle(signal.SIGINT, None)

    stopped = {"status": "interrupted", "exit_code": 4, "error": "stopped at once"}
    for said, expected in (({}, stopped), ({"rows": 3}, {"rows": 3})):
        with pytest.raises(SystemExit):
            stop_twice(said)
        assert json.loads(capsys.readouterr().out) == expected


@pytest.mark.parametrize(
    ("command", "said"), [("plan", ""), ("run", "; the same command goes on from there")]
)
def test_plan_keeps_nothing_and_promises_nothing_when_it_is_stopped(command, said):
    program = f"""if True:
        import signal, sys
        from batchrun.job.job import Job
        Job.load = lambda *_: signal.raise_signal(signal.SIGTERM)
        sys.argv = ["batchrun", "{command}", "job.yaml", "--json"]
        from batchrun.__main__ import main
        main()
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment())
    assert (ran.returncode, ran.stderr) == (4, f"stopped{said}\n")
    assert json.loads(ran.stdout) == {"status": "interrupted", "exit_code": 4, "error": f"stopped{said}"}


def test_an_interrupt_that_a_lock_turns_into_an_error_of_the_store_is_the_stop(capsys, tmp_path, tiny_llama):
    """As one does in the moment in which Condition.wait takes its lock back."""

    lock = threading.Lock()

    def listed() -> None:
        try:
            with lock:
                lock.release()
                raise KeyboardInterrupt
        except Exception as error:
            raise InputError(f"cannot be listed ({error})", "s3://lake/x", "check path and access") from None

    with pytest.raises(typer.Exit) as ended, replying(as_json=False, debug=False):
        listed()
    assert ended.value.exit_code == ExitCode.INTERRUPTED
    assert capsys.readouterr().err.splitlines()[-1].startswith("stopped")
    # The run's record, its report and whoever is notified hear the same.
    with pytest.raises(InputError) as found:
        listed()
    assert _outcome(found.value) == ("interrupted", "stopped")
    assert _failure(load(write_job(tmp_path, tiny_llama)), found.value)["status"] == "interrupted"
