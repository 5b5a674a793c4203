"""Workers that a scheduler has given up and that live on: paused, cut off, or left without any scheduler."""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from chaos.processes import Cluster, below, environment
from distributed import Client

from batchrun.commands.verify import verify
from jobs import batchrun, check_complete, load, start, wait_until, write_job

pytestmark = pytest.mark.timeout(600)

ROWS = 80
ENGINE = {"kind": "engines:SecondsEngine"}  # 0.2 s a row: a partition takes seconds, and is staged meanwhile


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> Path:
    return write_job(tmp_path, tiny_llama, rows=ROWS, engine=ENGINE, output={"rows_per_part": 10})


@pytest.fixture
def cluster_of(tmp_path: Path) -> Iterator[Callable[[int], Cluster]]:
    """Makes an own cluster, without nannies; it ends with the test."""
    with contextlib.ExitStack() as stack:

        def make(workers: int) -> Cluster:
            cluster = Cluster(workers, tmp_path, environment())
            stack.callback(cluster.stop)
            return cluster

        yield make


class Relay:
    """A TCP connection's other way: it passes bytes on, or when `cut` keeps them, as a broken network does."""

    def __init__(self, target: str) -> None:
        host, port = target.removeprefix("tcp://").split(":")
        self.target = (host, int(port))
        self.whole = threading.Event()
        self.whole.set()
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"tcp://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        self.whole.clear()

    def fix(self) -> None:
        self.whole.set()

    def _accept(self) -> None:
        while True:
            near, _ = self.listener.accept()
            try:
                far = socket.create_connection(self.target)
            except OSError:  # no scheduler yet
                near.close()
                continue
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._pump, args=(source, sink), daemon=True).start()

    def _pump(self, source: socket.socket, sink: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                self.whole.wait()
                sink.sendall(data)
        self.whole.wait()  # not even the end of a connection comes through
        for one in (source, sink):
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)


def begin(job: Path, cluster: Cluster) -> subprocess.Popen[str]:
    """A run that all workers of the cluster take part in, rows staged already."""
    with Client(cluster.address, timeout="60s", set_as_default=False) as client:
        client.wait_for_workers(len(cluster.workers), timeout=120)
    run = start("run", str(job), "--address", cluster.address, "--json")
    pids = [worker.pid for worker in cluster.workers]
    wait_until(lambda: staged(job.parent) and all(below([pid])["engine"] for pid in pids), run, 240.0)
    return run


def parts(folder: Path) -> dict[str, int]:
    return {path.name: path.stat().st_mtime_ns for path in (folder / "out/data").iterdir()}


def check_exact(folder: Path) -> None:
    check_complete(folder / "out", ROWS)
    assert verify(load(folder / "job.yaml")).found.passed


def staged(folder: Path) -> list[Path]:
    return list((folder / "out").rglob("*.chunk"))


def test_a_paused_worker_that_wakes_after_its_partitions_were_given_away_changes_nothing(
    tmp_path, job, cluster_of
):
    cluster = cluster_of(2)
    run = begin(job, cluster)
    zombie = cluster.workers[0]
    zombie.send_signal(signal.SIGSTOP)
    try:
        out, err = run.communicate(timeout=280)
        assert run.returncode == 0, err
        assert json.loads(out)["requests"] < 2 * ROWS
        before = parts(tmp_path)
        check_exact(tmp_path)
    finally:
        zombie.send_signal(signal.SIGCONT)
    with contextlib.suppress(subprocess.TimeoutExpired):
        zombie.wait(timeout=10)
    assert parts(tmp_path) == before
    check_exact(tmp_path)


def test_a_worker_that_is_cut_off_from_the_scheduler_loses_its_partitions_and_the_output_stays_exact(
    tmp_path, job, cluster_of
):
    cluster = cluster_of(1)
    relay = Relay(cluster.address)
    cluster.add_worker(relay.address)
    run = begin(job, cluster)
    relay.cut()
    _, err = run.communicate(timeout=280)
    assert run.returncode == 0, err
    assert cluster.workers[1].poll() is None, "it knows nothing of having been given up"
    before = parts(tmp_path)
    check_exact(tmp_path)
    relay.fix()
    with contextlib.suppress(subprocess.TimeoutExpired):
        cluster.workers[1].wait(timeout=10)
    assert parts(tmp_path) == before
    check_exact(tmp_path)


def test_a_scheduler_that_was_killed_and_started_again_takes_the_same_command(tmp_path, job, cluster_of):
    cluster = cluster_of(1)
    run = begin(job, cluster)
    cluster.scheduler.kill()
    _, err = run.communicate(timeout=120)
    assert run.returncode == 4, err
    cluster.workers[0].wait(60)  # without its scheduler it leaves, after it has staged what it holds
    deadline = time.monotonic() + 60
    while cluster.scheduler.poll() is not None or cluster.workers[0].poll() is not None:
        cluster.fix()
        assert time.monotonic() < deadline, "the cluster does not come back"
        time.sleep(0.1)
    code, out, err = batchrun("run", str(job), "--address", cluster.address, "--json")
    assert code == 0, err
    assert json.loads(out)["requests"] < ROWS, "what was staged is not generated again"
    check_exact(tmp_path)
