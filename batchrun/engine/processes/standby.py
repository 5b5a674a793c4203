"""An engine's process that starts before its worker does, and is handed over to it.

Imports alone take a process seconds. So whoever starts the workers starts their engines' processes first; each is
handed to the first worker that asks for it by name, over a socket: its connection, its output and, once it has ended,
its exit status. It ends with whoever started it and, once handed over, with its worker too. Linux only.
"""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import threading
import time
from contextlib import suppress
from multiprocessing.connection import Connection
from types import TracebackType
from typing import IO, Self, cast

from batchrun.engine.processes.launch import start

# In a worker's environment: the name of the process that stands by for it.
VARIABLE = "BATCHRUN_STANDBY"
STOP_SECONDS = 5.0

_PROCESS = struct.Struct("!qd")  # pid, when it was started
_STATUS = struct.Struct("!i")
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid: unix(7)


class Standby:
    """A context: one process that makes what it can of an engine of this kind, for the worker that asks for `name`.

    `env` is added to the process's environment, as for one that the worker starts by itself.
    """

    def __init__(self, kind: str, env: dict[str, str]) -> None:
        self.name = f"batchrun-{os.urandom(16).hex()}"
        self._kind, self._env = kind, env

    def __enter__(self) -> Self:
        self._began = time.time()
        # Of an abstract name no file is left behind.
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"\0{self.name}")
        self._listener.listen()
        ours, theirs = socket.socketpair()
        with theirs:
            # In this thread, which lives for as long as the context: the process ends with the one that started it.
            self._process = start(theirs.fileno(), self._env, self._kind)
        self._connection = Connection(ours.detach())
        self._handing_over = threading.Lock()
        threading.Thread(target=self._hand_over, name="batchrun-standby", daemon=True).start()
        return self

    def prepare(self, model_path: str) -> None:
        """The job is good so far: the process may use the GPU, and read this folder's weights ahead."""
        # Imports numpy, for which the process's start need not wait.
        from batchrun.engine.processes.wire import Prepare

        with self._handing_over, suppress(OSError):
            # Handed over or ended already: its worker says what more it is to do.
            self._connection.send(Prepare(model_path))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Ends the process, and waits for that where no worker has had it; a GPU's memory takes long to be freed."""
        self._process.kill()
        with suppress(OSError):
            # Wakes the thread that waits for a worker.
            self._listener.shutdown(socket.SHUT_RDWR)
        if not self._connection.closed:
            self._connection.close()
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)

    def _hand_over(self) -> None:
        output = cast(IO[bytes], self._process.stdout)
        with self._listener:
            try:
                worker, _ = self._listener.accept()
                while not _is_ours(worker):
                    worker.close()
                    worker, _ = self._listener.accept()
            except OSError:
                return
        with worker:
            with self._handing_over, self._connection, output, suppress(OSError):
                about = _PROCESS.pack(self._process.pid, self._began)
                socket.send_fds(worker, [about], [self._connection.fileno(), output.fileno()])
            threading.Thread(target=self._kill_with, args=(worker,), daemon=True).start()
            status = self._process.wait()
            with suppress(OSError):
                worker.sendall(_STATUS.pack(status))

    def _kill_with(self, worker: socket.socket) -> None:
        with suppress(OSError):
            worker.recv(1)
        self._process.kill()


class Adopted:
    """A process that another one has started, with what of a `Popen` an engine's parent uses."""

    def __init__(self, parent: socket.socket, pid: int, began: float, stdout: IO[bytes]) -> None:
        self.pid, self.began, self.stdout = pid, began, stdout
        self._parent = parent
        self._status: int | None = None

    def kill(self) -> None:
        """Ends it. Nothing happens where it has ended: its number may be another process's by now."""
        with suppress(OSError):
            self._parent.shutdown(socket.SHUT_WR)

    def wait(self, timeout: float | None = None) -> int:
        """Its exit status, as `Popen.wait` gives it. Raises subprocess.TimeoutExpired as that does."""
        if self._status is None:
            self._parent.settimeout(timeout)
            try:
                said = self._parent.recv(_STATUS.size)
            except TimeoutError:
                raise subprocess.TimeoutExpired("engine", cast(float, timeout)) from None
            except OSError:
                said = b""
            # It died with its parent, if that cannot tell any more.
            self._status = _STATUS.unpack(said)[0] if said else -signal.SIGKILL
            self._parent.close()
        return self._status


def adopt() -> tuple[Connection, Adopted] | None:
    """The process that stands by for this one, and the connection to it; None, as ever after, where there is none."""
    name = os.environ.pop(VARIABLE, None)
    if name is None:
        return None
    parent = socket.socket(socket.AF_UNIX)
    try:
        parent.connect(f"\0{name}")
        if not _is_ours(parent):
            raise ConnectionRefusedError(name)
        said, descriptors, _, _ = socket.recv_fds(parent, _PROCESS.size, 2)
        pid, began = _PROCESS.unpack(said)
        connection, output = descriptors
    except (OSError, struct.error, ValueError):
        # Another had it before, or it has ended with whoever started it.
        parent.close()
        return None
    return Connection(connection), Adopted(parent, pid, began, os.fdopen(output, "rb"))


def _is_ours(peer: socket.socket) -> bool:
    """Whether the same user is at the other end: what comes through the connection is unpickled."""
    credentials = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    uid: int = _CREDENTIALS.unpack(credentials)[1]
    return uid == os.getuid()
