"""Processes that are forked off one that has imported all of their modules already: imports take most of a short run.

There are two to fork off, one with what commands and Dask's workers import, one with what engines do. They start when
first asked, are shared by all of a session's tests, and end with it. No thread runs where they fork. What a process
does from there on is the same as of a program. That all of them can be started as programs, the tests of signals, of
kills and of starts hold, which use `jobs.start_program`.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from multiprocessing import popen_spawn_posix, util
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

if TYPE_CHECKING:
    import pytest

# In the environment: the session's process, and what the names of its sockets begin with.
VARIABLE = "BATCHRUN_TESTS_WARM"
SERVER = Path(__file__).with_name("warm_server.py")
COMMANDS, ENGINES = "commands", "engines"
PROGRAMS = {"batchrun.engine.server", "batchrun.engine.rank", "faulty_rank"}
STANDARD = [0, 1, 2]
REQUEST_BYTES = 1 << 17
START_SECONDS = 120.0
NUMBER = struct.Struct("!i")

_popen = subprocess.Popen
_spawn = util.spawnv_passfds
_poll = popen_spawn_posix.Popen.poll
_workers: dict[int, WarmProcess] = {}


class WarmProcess:
    """A process as whoever asked for it sees it, though it is another's child: its number and, once it has ended, its
    status. `run` says what it does, `descriptors` are its own under the numbers `at`."""

    def __init__(
        self, kind: str, run: dict[str, Any], env: Mapping[str, str], descriptors: list[int], at: list[int]
    ) -> None:
        self.returncode: int | None = None
        request = {
            "cwd": os.getcwd(),
            **run,
            "at": at,
            "env": dict(env),
            "asker": os.getpid(),
            "blocked": [int(one) for one in signal.pthread_sigmask(signal.SIG_BLOCK, [])],
        }
        self._reading = threading.Lock()
        self._warm = _connect(kind)
        socket.send_fds(self._warm, [json.dumps(request).encode()], descriptors)
        (self.pid,) = NUMBER.unpack(self._warm.recv(NUMBER.size))

    def __del__(self) -> None:
        if hasattr(self, "_warm"):
            self._warm.close()

    def poll(self) -> int | None:
        """Its status as `subprocess` gives it, if it has ended."""
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout: float | None = None) -> int:
        """Its status. Raises subprocess.TimeoutExpired."""
        if self.returncode is None:
            # Another thread may wait for it, too: the socket is closed when nobody can.
            ready = select.poll()
            ready.register(self._warm, select.POLLIN)
            if not ready.poll(None if timeout is None else timeout * 1000):
                raise subprocess.TimeoutExpired("a process", timeout or 0)
            with self._reading:
                if self.returncode is None:
                    said = self._warm.recv(NUMBER.size)
                    # Where nobody can tell any more, it was ended with whoever would have.
                    self.returncode = NUMBER.unpack(said)[0] if said else -signal.SIGKILL
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Nothing where it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """By SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """By SIGKILL."""
        self.send_signal(signal.SIGKILL)


class WarmCommand(WarmProcess):
    """`batchrun WORDS` in a session of its own, with what of a `Popen` with pipes the tests use. What it starts is
    forked too, or not."""

    def __init__(self, words: tuple[str, ...], env: Mapping[str, str], forks: bool = True) -> None:
        self.args = words
        (out, their_out), (err, their_err) = os.pipe(), os.pipe()
        run = {"module": ["batchrun", *words], "session": True, "forks": forks}
        super().__init__(COMMANDS, run, env, [0, their_out, their_err], STANDARD)
        os.close(their_out)
        os.close(their_err)
        self.stdout, self.stderr = os.fdopen(out), os.fdopen(err)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """All that it says until it has ended. Raises subprocess.TimeoutExpired."""
        said: dict[IO[str], str] = {}

        def read(stream: IO[str]) -> None:
            with stream:
                said[stream] = stream.read()

        streams = (self.stdout, self.stderr)
        readers = [threading.Thread(target=read, args=(one,), daemon=True) for one in streams]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join(timeout)
            if reader.is_alive():
                raise subprocess.TimeoutExpired(self.args, timeout or 0)
        self.wait(timeout)
        return said[self.stdout], said[self.stderr]


class WarmModule(WarmProcess):
    """`python -m MODULE ...` in this folder, with what of a `Popen` the tests use. What it starts are programs."""

    def __init__(
        self,
        words: list[str],
        env: Mapping[str, str],
        out: IO[bytes],
        err: IO[bytes],
        folder: Path,
        session: bool = False,
    ) -> None:
        with open(os.devnull) as nothing:
            run = {"module": words, "cwd": str(folder), "session": session, "forks": False}
            descriptors = [nothing.fileno(), out.fileno(), err.fileno()]
            super().__init__(COMMANDS, run, env, descriptors, STANDARD)


class WarmProgram(WarmProcess):
    """`subprocess.Popen` of `python -m PROGRAM ...`, as far as an engine's parents call it. It ends with its parent."""

    def __init__(
        self,
        words: list[str],
        env: Mapping[str, str],
        pass_fds: list[int],
        stdout: int | None = None,
        **_: Any,
    ) -> None:
        with open(os.devnull) as nothing:
            ours, theirs = os.pipe() if stdout == subprocess.PIPE else (None, None)
            said = [1, 2] if theirs is None else [theirs, theirs]
            descriptors, at = [nothing.fileno(), *said, *pass_fds], [*STANDARD, *pass_fds]
            super().__init__(ENGINES, {"program": words[2:]}, env, descriptors, at)
        self.stdout = None
        if ours is not None and theirs is not None:
            os.close(theirs)
            self.stdout = os.fdopen(ours, "rb")


def begin() -> None:
    """This process's tests, and those of processes that it starts, share what is warm until it ends."""
    os.environ.setdefault(VARIABLE, f"{os.getpid()} batchrun-{os.urandom(8).hex()}")


def fork_all() -> None:
    """From now on, all that this process starts is forked: workers, engines and their ranks."""
    subprocess.Popen = start_program  # type: ignore[misc, assignment]
    fork_workers()


def fork_workers() -> None:
    """From now on, workers that a nanny of Dask starts in this process are forked."""
    util.spawnv_passfds = _fork_worker
    popen_spawn_posix.Popen.poll = _poll_worker


def spawn_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, until the test has ended, they are programs again."""
    monkeypatch.setattr(util, "spawnv_passfds", _spawn)


def fork_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, until the test or the fixture has ended, so are engines that this process starts."""
    monkeypatch.setattr(subprocess, "Popen", start_program)


def start_program(words: Any, **options: Any) -> Any:
    """In the place of `subprocess.Popen`: engines and their ranks are forked."""
    is_engine = isinstance(words, list) and words[1:2] == ["-m"] and words[2] in PROGRAMS
    return WarmProgram(words, **options) if is_engine else _popen(words, **options)


def _connect(kind: str) -> socket.socket:
    """To the process of that kind, which is started where there is none. It takes a while until that listens."""
    begin()
    name = os.environ[VARIABLE].split()[1]
    deadline = time.monotonic() + START_SECONDS
    started = False
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(f"\0{name}-{kind}")
            return connection
        except ConnectionRefusedError:
            connection.close()
            assert time.monotonic() < deadline, f"nothing answers: python {SERVER} {kind}"
        if not started:
            # A command needs an engine soon.
            for one in {kind, ENGINES}:
                _start(one)
            started = True
        time.sleep(0.05)


def _start(kind: str) -> None:
    from jobs import environment

    words, null = [sys.executable, str(SERVER), kind, *os.environ[VARIABLE].split()], subprocess.DEVNULL
    _popen(words, env=environment(), stdin=null, stdout=null, stderr=null, start_new_session=True)


def _fork_worker(path: Any, words: list[Any], descriptors: Any) -> int:
    code = words[words.index("-c") + 1]
    if "spawn_main" not in code:
        return _spawn(path, words, descriptors)
    everything = [*STANDARD, *descriptors]
    worker = WarmProcess(COMMANDS, {"spawned": code}, os.environ, everything, everything)
    _workers[worker.pid] = worker
    return worker.pid


def _poll_worker(self: Any, flag: int = os.WNOHANG) -> int | None:
    worker = _workers.get(self.pid)
    if self.returncode is not None or worker is None:
        return _poll(self, flag)
    self.returncode = worker.poll() if flag == os.WNOHANG else worker.wait()
    if self.returncode is not None:
        # The next process of this number may be a program.
        _workers.pop(self.pid, None)
    return self.returncode
