"""Stop signals, in every phase; and workers that start however the run was started."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import warm
from chaos.command import Command
from chaos.processes import start_store
from slow_server import Relay, slow_server
from stores import s3_bucket
from warm import WarmCommand

from batchrun import run, signals
from batchrun.cluster import connect
from batchrun.errors import ExitCode, StorageError
from batchrun.job.settings import ClusterSettings
from batchrun.output import manifest
from batchrun.storage import Folder, deadline
from batchrun.storage import folder as folders
from jobs import SUPPORT, environment, load, start, start_driver, start_program, write_job

OPTIONS = {"key": "k", "secret": "secret", "client_kwargs": {"region_name": "us-east-1"}}


@pytest.fixture(autouse=True)
def _hang_up_as_from_a_terminal() -> Iterator[None]:
    """Under nohup these tests would start processes that ignore a hang-up, as they should."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def slow_options(endpoint: str) -> dict[str, object]:
    return {**OPTIONS, "client_kwargs": {"region_name": "us-east-1", "endpoint_url": endpoint}}


def ended(process: subprocess.Popen[str] | WarmCommand, number: signal.Signals) -> tuple[int, float, str]:
    """The process's exit code, seconds until it ended after the signal, and what it said."""
    sent = time.monotonic()
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    return process.returncode, time.monotonic() - sent, said


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stop_while_python_still_imports_ends_with_4_and_one_line(number, tmp_path, tiny_llama):
    process = start_program("run", str(write_job(tmp_path, tiny_llama)))
    # The signals are hooked in before anything else is imported.
    deadline = time.monotonic() + 30
    while not caught(process.pid, number) and time.monotonic() < deadline:
        time.sleep(0.005)
    code, seconds, said = ended(process, number)
    assert (code, said.count("\n")) == (4, 1), said
    assert said.startswith("stopped")
    assert seconds < within_5_seconds()


def test_a_stop_while_python_still_imports_ends_with_4_where_nothing_can_be_said(tmp_path, tiny_llama):
    """As where the terminal is gone that the stop came from; it ended with 1."""
    with open("/dev/full", "w") as full:
        words = [sys.executable, "-m", "batchrun", "run", str(write_job(tmp_path, tiny_llama))]
        process = subprocess.Popen(words, env=environment(), stderr=full, stdout=full)
        wait_until(lambda: caught(process.pid, signal.SIGTERM))
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 4


def test_a_stop_that_an_import_turns_into_another_error_ends_with_4_and_one_line():
    code = """if True:
        import os, signal, sys, time
        from batchrun.__main__ import main
        class Finder:
            def find_spec(self, name, path=None, target=None):
                if name == "batchrun.cli":
                    try:
                        os.kill(os.getpid(), signal.SIGTERM)
                        time.sleep(5)
                    except KeyboardInterrupt:
                        raise ImportError("left by halves")
        sys.meta_path.insert(0, Finder())
        main()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (4, "stopped\n")


def caught(pid: int, number: signal.Signals) -> bool:
    """Whether the process handles the signal."""
    status = Path(f"/proc/{pid}/status").read_text()
    mask = int(status.partition("SigCgt:")[2].split()[0], 16)
    # Python itself handles SIGINT from its start on.
    return bool(mask >> (signal.SIGTERM - 1) & mask >> (number - 1) & 1)


@pytest.mark.parametrize(
    ("place", "drip"), [("input.path", True), ("output.path", False), ("model.name", True)]
)
def test_a_stop_ends_a_run_within_seconds_whatever_store_it_waits_for(place, drip, tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    with slow_server(drip) as endpoint:
        options = f"{place.partition('.')[0]}.storage_options={json.dumps(slow_options(endpoint))}"
        process = start_program("run", str(job), "--set", f"{place}=s3://lake/x", "--set", options)
        wait_for_connection(process.pid, int(endpoint.rpartition(":")[2]))
        code, seconds, said = ended(process, signal.SIGTERM)
    assert (code, said.count("\n")) == (4, 1), said
    assert said.startswith("stopped")
    assert seconds < within_5_seconds()


def wait_for_connection(pid: int, port: int) -> None:
    process = psutil.Process(pid)
    wait_until(lambda: any(c.raddr and c.raddr.port == port for c in process.net_connections()))


@pytest.mark.parametrize("drip", [True, False])
def test_every_request_has_a_deadline(drip, monkeypatch):
    monkeypatch.setattr(deadline, "REQUEST", 0.5)
    monkeypatch.setattr(deadline, "UNSIZED", 0.5)
    monkeypatch.setattr(folders, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(folders, "PATIENCE", 1.0)
    with slow_server(drip) as endpoint:
        folder = Folder("s3://lake/out", slow_options(endpoint))
        calls: list[Callable[[], object]] = [folder.list, lambda: folder.read("key")]
        if not drip:  # these need no more than a header, which comes at once
            calls += [
                lambda: folder.size("key"),
                lambda: folder.put("key", b"bytes"),
                lambda: folder.put_if_absent("key", b"bytes"),
                lambda: folder.delete(["key"]),
            ]
        for call in calls:
            began = time.monotonic()
            with pytest.raises(StorageError, match="kept failing"):
                call()
            assert time.monotonic() - began < within_5_seconds()


@pytest.mark.parametrize("drip", [False, True])
def test_a_stop_ends_a_run_whose_store_answers_no_more_within_5_seconds_with_what_is_safe(
    drip, tmp_path, tiny_llama
):
    store, (host, port) = start_store(tmp_path / "store.log")
    try:
        with Relay((host, port)) as relay:
            place = s3_bucket(f"http://{host}:{port}", "k", "secret")
            job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
            options = json.dumps(place.through(relay.address).options)
            output = [f"output.path={place.url}/out", f"output.storage_options={options}"]
            process = start_program("run", str(job), *(word for one in output for word in ("--set", one)))
            folder = Folder(f"{place.url}/out", place.options)
            wait_until(lambda: any(key.endswith(".chunk") for key in folder.list("_job/stage/")))
            relay.spoil(drip)
            # The next chunk is due every 0.3 s: its put is one of those that get no answer.
            wait_until(lambda: relay.unanswered > 0)
            code, seconds, said = ended(process, signal.SIGTERM)
    finally:
        store.kill()
    assert code == 4, said
    assert "of 60 rows are safe" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert seconds < within_5_seconds()


def within_5_seconds() -> float:
    """As long as 5 s of a machine of its own may take now that others work on it."""
    return 5.0 * max(2.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.1)


def test_a_stop_is_heard_by_the_worker_that_takes_the_place_of_a_lost_one(tmp_path, tiny_llama):
    engine, output = {"kind": "engines:SecondsEngine"}, {"rows_per_part": 200, "flush_rows": 2}
    job = write_job(tmp_path, tiny_llama, rows=600, row_group=200, engine=engine, output=output)
    process = start_driver("run", str(job))
    wait_until(lambda: any((tmp_path / "out/_job").glob("stage/*/*.chunk")))
    for child in psutil.Process(process.pid).children():
        if "spawn_main" in " ".join(child.cmdline()):
            child.kill()
    assert process.stderr is not None
    lost = next(line for line in process.stderr if "its worker was lost" in line)
    assert lost.count("Attempted") == 0, "Dask's own words"
    # What was lost waits for another worker by now.
    time.sleep(0.5)
    code, seconds, said = ended(process, signal.SIGTERM)
    assert code == 4, said
    assert "0 in 0 of 3 parts" in said.splitlines()[-1]
    assert "3/3 parts" not in said, "partitions that were given up are not done"
    assert seconds < within_5_seconds()


def test_a_stop_after_the_manifest_ends_with_what_the_data_is(tmp_path, tiny_llama):
    process = start("run", str(write_job(tmp_path, tiny_llama)))
    wait_until((tmp_path / "out/_job/manifest.json").exists)
    code, seconds, said = ended(process, signal.SIGTERM)
    assert code == 0, said
    assert "the same command goes on" not in said
    assert seconds < within_5_seconds()


def test_a_stop_in_the_moment_in_which_the_manifest_comes_ends_with_what_the_data_is(
    tmp_path, tiny_llama, cluster, monkeypatch
):
    """As between a file's rename and the sync of its folder; it ended with 4 and "the same command goes on"."""
    monkeypatch.setattr(signals, "_exit_code", ExitCode.INTERRUPTED)
    monkeypatch.setattr(signals, "safe", "")
    write = manifest.write

    def interrupted(*how: Any) -> None:
        write(*how)
        raise KeyboardInterrupt

    monkeypatch.setattr(manifest, "write", interrupted)
    job = load(write_job(tmp_path, tiny_llama))
    with pytest.raises(KeyboardInterrupt):
        run(job, client=cluster)
    assert (signals.exit_code(), signals.safe) == (0, f"stopped; the output is complete: {tmp_path / 'out'}")


def test_a_terminal_that_is_closed_stops_a_run_with_4(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    command = Command(["run", str(job)], tmp_path / "log", True, environment())
    try:
        wait_until(lambda: any((tmp_path / "out/_job").glob("stage/*/*.chunk")))
        command.hang_up()
        assert command.process.wait(60) == 4, command.text
    finally:
        command.clear()


def test_a_process_that_hangs_after_its_tasks_have_staged_ends_all_the_same(tmp_path):
    script = (
        "import os, signal, threading\n"
        "from batchrun import signals\n"
        "signals.install()\n"
        "with signals.attended():\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "threading.Event().wait()\n"
    )
    began = time.monotonic()
    ran = subprocess.run([sys.executable, "-c", script], env=environment(), capture_output=True, timeout=60)
    assert ran.returncode == 4, ran.stderr
    assert time.monotonic() - began < within_5_seconds()


def test_a_stop_while_the_process_already_leaves_keeps_its_code_its_output_and_says_nothing():
    code = """if True:
        import atexit, os, signal, time
        from batchrun import signals
        from batchrun.__main__ import end
        signals.install()
        atexit.register(lambda: (os.kill(os.getpid(), signal.SIGTERM), time.sleep(30)))
        print("answers")
        end(3)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, "answers\n", "")


def test_a_stop_in_a_finalizer_interrupts_what_ran_and_prints_no_traceback():
    """Python drops what is raised there: the stop took its 4 seconds, and a traceback was shown."""
    code = """if True:
        import os, signal, sys, time
        from batchrun import signals
        signals.install()
        class Finalized:
            def __del__(self):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0)
        class BegunByHalves:
            def __del__(self):
                raise AssertionError("invalid stop_timing() call")
        try:
            del_me = Finalized()
            del del_me
            time.sleep(3)
            print("not interrupted")
        except KeyboardInterrupt:
            BegunByHalves()
            print("interrupted", flush=True)
        os._exit(0)
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_a_tracker_that_was_killed_and_came_again_prints_no_traceback():
    """It did at the end of a run, where a terminal that closed with it might show its first line and no more."""
    code = """if True:
        import gc, multiprocessing, os, signal
        from multiprocessing import resource_tracker
        from batchrun.cluster.nanny import apart
        with apart():
            queue = multiprocessing.get_context("spawn").Queue()
            os.kill(resource_tracker._resource_tracker._pid, signal.SIGKILL)
            os.waitid(os.P_PID, resource_tracker._resource_tracker._pid, os.WEXITED | os.WNOWAIT)
        del queue
        gc.collect()
        resource_tracker._resource_tracker._stop()
    """
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "relaunching" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_driver_that_is_killed_leaves_no_warning_on_the_terminal():
    """Python's tracker of semaphores wrote of leaked ones behind the shell's next prompt."""
    code = """if True:
        import multiprocessing, os, signal
        from batchrun.cluster.nanny import apart
        with apart():
            queue = multiprocessing.get_context("spawn").Queue()
            os.kill(os.getpid(), signal.SIGKILL)
    """
    # Until the tracker, which holds its end of the pipe, has ended too.
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (-signal.SIGKILL, "")


def test_a_store_is_not_waited_for_once_the_run_was_told_to_stop(monkeypatch):
    stop = threading.Event()
    threading.Timer(0.5, stop.set).start()
    began = time.monotonic()
    with slow_server(drip=False) as endpoint, deadline.until(stop.is_set), pytest.raises(StorageError):
        Folder("s3://lake/out", slow_options(endpoint)).put("key", b"bytes")
    assert time.monotonic() - began < within_5_seconds()


def test_a_worker_that_is_killed_while_it_starts_is_replaced(monkeypatch):
    warm.spawn_workers(monkeypatch)
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    here, killed = psutil.Process(), []
    # Another test's cluster may be up in this process.
    others = {child.pid for child in here.children()}

    def kill_two() -> None:
        while len(killed) < 2:
            with suppress(psutil.NoSuchProcess):
                for child in here.children():
                    if child.pid not in {*killed, *others} and "spawn_main" in " ".join(child.cmdline()):
                        child.kill()
                        killed.append(child.pid)
            time.sleep(0.02)

    killer = threading.Thread(target=kill_two, daemon=True)
    killer.start()
    with connect(ClusterSettings(workers=1)) as client:
        client.wait_for_workers(1, timeout=60)
        killer.join(60)
        assert len(killed) == 2
        assert client.submit(os.getpid).result() not in killed


@pytest.mark.parametrize("how", ["file", "stdin"])
def test_a_script_runs_a_job_without_a_guard_for_its_main(how, tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    script = tmp_path / "script.py"
    script.write_text(f"import batchrun\nprint(batchrun.run({str(job)!r}).rows)\n")
    with script.open() as file:
        words = [str(script)] if how == "file" else ["-"]
        ran = subprocess.run(
            [sys.executable, *words],
            stdin=file,
            capture_output=True,
            text=True,
            env=environment(),
            cwd=SUPPORT,
            timeout=120,
        )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "60\n", ""), ran.stderr
