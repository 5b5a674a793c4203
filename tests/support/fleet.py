"""A Dask cluster of real processes, as a person starts one by hand: a scheduler, and workers on several addresses."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from distributed import Client
from warm import WarmModule

from jobs import environment

DASK = [sys.executable, "-m", "dask"]
Process = subprocess.Popen[bytes] | WarmModule


class Fleet:
    """Processes are started by `scheduler` and `worker` and end with `stop`; logs lie in `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = ""
        self.processes: list[Process] = []

    def scheduler(self) -> str:
        file = self.folder / "scheduler.json"
        words = ["--host", "127.0.0.1", "--port", "0", "--dashboard-address", "127.0.0.1:0"]
        self.start("scheduler", [*DASK, "scheduler", *words, "--scheduler-file", str(file)])
        wait_until(lambda: file.exists() and file.read_text(), "the scheduler does not start")
        self.address = json.loads(file.read_text())["address"]
        return self.address

    def worker(self, host: str = "127.0.0.1", *words: str, **env: str) -> Process:
        own = ["--host", host, "--no-dashboard", "--death-timeout", "60", *words]
        if "--nthreads" not in words:
            own += ["--nthreads", "2"]
        return self.start("worker", [*DASK, "worker", self.address, *own], **env)

    def wait_for(self, workers: int) -> None:
        with Client(self.address, set_as_default=False) as client:
            client.wait_for_workers(workers, timeout=180)

    def workers(self) -> list[str]:
        with Client(self.address, set_as_default=False) as client:
            return list(client.scheduler_info(n_workers=-1)["workers"])

    def stop(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()

    def start(self, name: str, words: list[str], **env: str) -> Process:
        """Any command in a process group of its own; what it prints goes to a file."""
        log = open(self.folder / f"{name}-{len(self.processes)}.log", "wb")  # noqa: SIM115
        own = environment(**{"DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED": "False", **env})
        process: Process
        if words[: len(DASK)] == DASK:
            process = WarmModule(["dask", *words[len(DASK) :]], own, log, log, self.folder, session=True)
        else:
            process = subprocess.Popen(
                words, env=own, stdout=log, stderr=log, cwd=self.folder, start_new_session=True
            )
        self.processes.append(process)
        return process


@contextmanager
def fleet(folder: Path) -> Iterator[Fleet]:
    """A running scheduler without workers; whatever was started ends with the context."""
    folder.mkdir(parents=True, exist_ok=True)
    one = Fleet(folder)
    try:
        one.scheduler()
        yield one
    finally:
        one.stop()


def wait_until(condition: object, complaint: str, seconds: float = 240.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline, complaint
        time.sleep(0.05)


def has_second_loopback() -> bool:
    """Whether 127.0.0.2 is this machine, as it is on Linux."""
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.2", 0))
        except OSError:
            return False
    return True


def host_of(address: str) -> str:
    return re.sub(r"^\w+://|:\d+$", "", address)
