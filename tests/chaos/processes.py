"""The processes that faults hit: the store, a scheduler with workers, drivers, engines."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from pathlib import Path

import psutil
from warm import WarmModule

ROOT = Path(__file__).parents[2]
SLOTS = 2
# As Dask's own configuration names them. A worker that is paused for longer has lost its partitions.
TTL = 15.0
DASK = {
    "DASK_DISTRIBUTED__SCHEDULER__WORKER_TTL": f"{TTL:.0f}s",
    "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False",
}
REVIVAL = 1.0  # seconds that a dead worker or scheduler stays away


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(ROOT / "tests/support"), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, **DASK, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


def start_store(log: Path) -> tuple[subprocess.Popen[bytes], tuple[str, int]]:
    """An S3 server in a process of its own, once it answers."""
    place = ("127.0.0.1", free_port())
    words = [sys.executable, "-m", "moto.server", "-H", place[0], "-p", str(place[1])]
    with open(log, "wb") as file:
        process = subprocess.Popen(words, stdout=file, stderr=file, env=environment())
    deadline = time.monotonic() + 60
    while True:
        try:
            socket.create_connection(place, 1).close()
            return process, place
        except OSError:
            assert process.poll() is None, log.read_text()
            assert time.monotonic() < deadline, "the store does not answer"
            time.sleep(0.1)


class Cluster:
    """A scheduler at a fixed address and workers without nannies; what died comes back after a moment."""

    def __init__(self, workers: int, folder: Path, env: dict[str, str]) -> None:
        self.address = f"tcp://127.0.0.1:{free_port()}"
        self.folder, self.env = folder, env
        self.scheduler = self._start_scheduler()
        self.workers = [self._start_worker(self.address) for _ in range(workers)]
        self._gone: dict[int, float] = {}

    def fix(self) -> None:
        """Starts again what has been dead for a moment."""
        if self._away(self.scheduler):
            self.scheduler = self._start_scheduler()
        for i, worker in enumerate(self.workers):
            if self._away(worker):
                self.workers[i] = self._start_worker(self.address)

    def add_worker(self, address: str) -> None:
        """One more, which reaches the scheduler under another address."""
        self.workers.append(self._start_worker(address))

    def stop(self) -> None:
        for process in [*self.workers, self.scheduler]:
            process.kill()
            process.wait()

    def _away(self, process: WarmModule) -> bool:
        if process.poll() is None:
            return False
        return time.monotonic() - self._gone.setdefault(process.pid, time.monotonic()) > REVIVAL

    def _start_scheduler(self) -> WarmModule:
        host, port = self.address.removeprefix("tcp://").split(":")
        return self._start("scheduler", "--host", host, "--port", port, "--no-dashboard")

    def _start_worker(self, address: str) -> WarmModule:
        own = ["--no-nanny", "--nthreads", str(SLOTS), "--no-dashboard", "--death-timeout", "60"]
        return self._start("worker", address, "--host", "127.0.0.1", *own)

    def _start(self, what: str, *words: str) -> WarmModule:
        with open(self.folder / f"{what}.log", "ab") as log:
            module = [f"distributed.cli.dask_{what}", *words]
            return WarmModule(module, self.env, log, log, self.folder)


class Driver:
    """`batchrun run`, its output in files, so that no pipe ever blocks it."""

    _count = 0

    def __init__(self, job: Path, folder: Path, env: dict[str, str], *words: str) -> None:
        Driver._count += 1
        self.log = folder / f"driver-{Driver._count}.log"
        self.out = folder / f"driver-{Driver._count}.json"
        with open(self.log, "wb") as err, open(self.out, "wb") as out:
            module = ["batchrun", "run", str(job), "--json", *words]
            self.process = WarmModule(module, env, out, err, folder)

    @property
    def ended(self) -> int | None:
        return self.process.poll()

    @property
    def last_words(self) -> str:
        lines = deque(self.log.read_text(errors="replace").strip().splitlines(), 1)
        return lines[0][:300] if lines else ""

    @property
    def result(self) -> dict[str, object]:
        return dict(json.loads(self.out.read_text().splitlines()[-1]))


def below(pids: list[int]) -> dict[str, list[psutil.Process]]:
    """The living workers of nannies and the engines under these processes."""
    found: dict[str, list[psutil.Process]] = {"worker": [], "engine": []}
    for pid in pids:
        try:
            children = psutil.Process(pid).children(recursive=True)
        except psutil.Error:
            continue
        for child in children:
            try:
                words = " ".join(child.cmdline())
            except psutil.Error:
                continue
            if "batchrun.engine.server" in words:
                found["engine"].append(child)
            elif "spawn_main" in words:
                found["worker"].append(child)
    return found


def send(pid: int, number: signal.Signals) -> bool:
    """Whether the process was there to be sent the signal."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True
