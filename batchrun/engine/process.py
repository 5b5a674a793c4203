"""The engine in a process of its own: its crash, memory or busy loop is never the worker's."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.last_words import error_line, last_line, lines_of
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.engine.wire import Cancel, CompletionPack, Failed, RequestPack
from batchrun.errors import BatchrunError, EngineDied, EngineError, EngineNotLoaded

PACK_ROWS = 512
PACK_TOKENS = 1 << 18
# A caller gets None at least so often, and can flush, or look whether it is still wanted.
PATIENCE_SECONDS = 0.5
STARVED_SECONDS = 0.02
ABORT_SECONDS = 2.0
STOP_SECONDS = 5.0
OUTPUT_BYTES = 1 << 16


class EngineProcess:
    """One engine for a worker's whole life: started on first use, and again after it died.

    `env` is added to the process's environment (`CUDA_VISIBLE_DEVICES`, `OMP_NUM_THREADS`, ...).
    """

    def __init__(self, spec: EngineSpec, env: dict[str, str] | None = None) -> None:
        self.spec = spec
        self.env = env or {}
        # Twice the engine's own window, so that the next window is full when the engine comes for it.
        self.window = 2 * cast(int, spec.options.get("window_rows", 8192))
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._tired = 0
        self.launches = 0  # processes that were started, the present one included
        self._users = 0

    def generate(
        self, requests: Iterator[Request | None], wanted: Callable[[], bool] = lambda: True
    ) -> Generator[Completion | None, None, None]:
        """A completion for each request exactly once, in any order; may run in several threads at once.

        Pulls `requests` only while there is room, of which every running call gets an equal share. Yields
        None when nothing has finished for half a second. Once `wanted()` is false, pulls no more, and gives back
        what is in flight as it is ("cancelled"), as far as that comes in two seconds. Closing the generator drops
        the requests not yet answered.

        Raises:
            EngineDied: the engine's process ended by itself; the next call starts a new one.
            EngineNotLoaded: it ended, or failed, before its model was loaded.
            EngineError, ModelError: what the engine raised while loading or generating.
        """
        while (stream := self._open_stream()) is None:
            if not wanted():
                return
            time.sleep(PATIENCE_SECONDS)
            yield None
        try:
            more = True
            while (more or stream.pending) and wanted():
                patience = PATIENCE_SECONDS
                room = stream.reserve() if more else 0
                if room:
                    batch, more = _collect(requests, room)
                    stream.send(batch, room)
                    patience = STARVED_SECONDS if more and not batch else 0
                yield from stream.take(patience)
            if stream.pending:
                yield from stream.abort()
        finally:
            stream.close()

    def start(self) -> None:
        """Starts the process, if there is none, and waits for nothing; the first use raises what came of it."""
        with self._lock:
            if self._child is None:
                self._launch()

    def load(self) -> None:
        """Returns once the model is loaded. Raises as `generate` does."""

        def until_loaded() -> Iterator[None]:
            while not self.pid or self.stats().pid != self.pid:
                yield None

        for _ in self.generate(until_loaded()):
            pass

    def renew(self, pid: int) -> None:
        """Replaces the process `pid`, if it is still the present one, before the next use that begins.

        That use waits until those that have begun are over, since a device seldom holds a model twice.
        """
        self._tired = pid

    def stats(self) -> EngineStats:
        """The newest counters that arrived from the present process: at most 0.2 s old while it works."""
        return self._child.stats if self._child else EngineStats()

    def loading_seconds(self) -> float:
        """CPU seconds that a process has used whose model is not loaded yet; 0 otherwise."""
        if not self._child or self._child.failure or self._child.stats.pid:
            return 0.0
        with contextlib.suppress(OSError, IndexError, ValueError):  # it has just ended, or this is no Linux
            ticks = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
            return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")
        return 0.0

    @contextlib.contextmanager
    def in_use(self) -> Iterator[EngineProcess]:
        """The engine, not `idle` for as long as this is open: also before the first call of `generate`."""
        with self._lock:
            self._users += 1
        try:
            yield self
        finally:
            with self._lock:
                self._users -= 1

    @property
    def idle(self) -> bool:
        """Whether nobody has it `in_use`."""
        return not self._users

    @property
    def pid(self) -> int | None:
        """The engine's process, None before the first use."""
        return self._child.pid if self._child else None

    def stop(self) -> None:
        """Ends the process. Streams that are still running raise EngineDied; a later use starts a new one."""
        with self._lock:
            if self._child:
                self._child.stop()

    def _open_stream(self) -> _Stream | None:
        """A stream of a living process; None while one that is to be replaced still works for others."""
        with self._lock:
            if self._child and self._child.pid == self._tired and not self._child.failure:
                if self._child.streams:
                    return None
                self._child.stop()
            # One that failed before its first use has that use to tell of it.
            if self._child is None or (self._child.failure and self._child.used):
                self._launch()
            assert self._child is not None
            return self._child.open_stream()

    def _launch(self) -> None:
        self.launches += 1
        self._child = _Child(self.spec, self.env, self.window, self.launches)


class _Stream:
    """One caller of `generate`: what it has sent, and what came back for it."""

    def __init__(self, child: _Child, number: int) -> None:
        self.child = child
        self.number = number
        self.sent = 0
        self.pending: dict[int, int] = {}
        # Guarded by the child's lock: rows reserved or sent and not yet back, and packs to be taken.
        self.outstanding = 0
        self.arrived: deque[tuple[CompletionPack, NDArray[np.intp]]] = deque()

    def reserve(self) -> int:
        """How many rows may be sent now; 0 rather than a handful, since every pack costs the same."""
        with self.child.changed:
            share = max(1, self.child.window // len(self.child.streams))
            total = sum(stream.outstanding for stream in self.child.streams.values())
            room = min(PACK_ROWS, self.child.window - total, share - self.outstanding)
            if room < min(PACK_ROWS, max(1, share // 16)):
                return 0
            self.outstanding += room
            return room

    def send(self, batch: list[Request], reserved: int) -> None:
        """Sends the batch and gives back what it leaves of the reservation."""
        with self.child.changed:
            self.outstanding -= reserved - len(batch)
        if not batch:
            return
        self.pending.update(enumerate((request.id for request in batch), self.sent))
        pack = RequestPack.pack(self.number, self.sent, batch)
        self.sent += len(batch)
        self.child.send(pack)

    def take(self, timeout: float) -> Iterator[Completion | None]:
        """What has arrived; if nothing has, waits so long for it, for room, or for the end of the process."""
        with self.child.changed:
            if timeout and not self.arrived and not self.child.failure:
                self.child.changed.wait(timeout)
            packs = list(self.arrived)
            self.arrived.clear()
        for pack, indices in packs:
            yield from pack.unpack(indices, self.pending)
        if not packs:
            self.child.check()
            if timeout:
                yield None

    def abort(self) -> Iterator[Completion | None]:
        """What comes of a cancelled stream's rows in the time that there is."""
        self.child.send(Cancel(self.number, keep=True))
        deadline = time.monotonic() + ABORT_SECONDS
        while self.pending and (left := deadline - time.monotonic()) > 0:
            yield from self.take(min(left, PATIENCE_SECONDS))

    def close(self) -> None:
        with self.child.changed:
            del self.child.streams[self.number]
            unanswered = self.outstanding > 0 and not self.child.failure
            self.child.changed.notify_all()
        if unanswered:
            with contextlib.suppress(BatchrunError):  # a process that ended has dropped the rows by itself
                self.child.send(Cancel(self.number))


class _Child:
    """One engine process, and the thread that starts it, routes what it says and outlives it.

    That thread must be the one that starts the process: the parent-death signal fires when it ends.
    """

    def __init__(self, spec: EngineSpec, env: dict[str, str], window: int, launch: int) -> None:
        self.window = window
        self._launch = launch
        self.stats = EngineStats()
        self.failure: BatchrunError | None = None
        self.changed = threading.Condition()
        self.streams: dict[int, _Stream] = {}
        self._opened = 0
        self._began = time.time()
        self._output = b""
        self._stopped = False
        self._process: subprocess.Popen[bytes] | None = None
        self._sending = threading.Lock()
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        self._connection.send(spec)
        self._started = threading.Event()
        self._receiver = threading.Thread(target=self._live, args=(env, theirs), daemon=True)
        self._receiver.start()
        self._started.wait()

    @property
    def used(self) -> bool:
        return self._opened > 0

    def open_stream(self) -> _Stream:
        with self.changed:
            self._opened += 1
            stream = self.streams[self._opened] = _Stream(self, self._opened)
            return stream

    def send(self, message: RequestPack | Cancel) -> None:
        try:
            with self._sending:
                self._connection.send(message)
        except OSError as error:
            # The process is gone; the receiver is about to know why.
            self._receiver.join(STOP_SECONDS)
            self.check()
            raise EngineDied(f"the engine's process does not listen any more ({error})") from error

    def check(self) -> None:
        """Raises what the process ended with, if it has."""
        if self.failure:
            raise copy.copy(self.failure)

    def stop(self) -> None:
        self._stopped = True
        if self._process:
            self._process.kill()
        self._receiver.join(STOP_SECONDS)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def _live(self, env: dict[str, str], theirs: socket.socket) -> None:
        try:
            with theirs:
                self._process = _start(theirs.fileno(), env)
            self._started.set()
            failure = self._route(self._process)
        except Exception as error:
            failure = EngineNotLoaded(f"the engine's process could not be run: {error!r}")
        if isinstance(failure, EngineError) and not self._stopped:
            failure.launch, failure.output = self._launch, self._lines
        with self.changed:
            self.failure = failure
            self.changed.notify_all()
        self._started.set()

    def _route(self, process: subprocess.Popen[bytes]) -> BatchrunError:
        """Delivers until the process has ended; gives back what it ended with."""
        assert process.stdout is not None
        last_words: BatchrunError | None = None
        sources: list[Any] = [self._connection, process.stdout]
        try:
            while True:
                ready: list[Any] = wait(sources)
                for source in ready:
                    if source is process.stdout:
                        if not self._keep_output(process.stdout):
                            sources.remove(source)
                        continue
                    message = self._connection.recv()
                    if isinstance(message, Failed):
                        last_words = message.error
                    else:
                        self._deliver(message)
        except (EOFError, OSError):
            return last_words or self._death(process)
        finally:
            process.kill()
            process.wait()
            self._keep_rest(process.stdout)
            process.stdout.close()

    def _deliver(self, pack: CompletionPack) -> None:
        if pack.stats:
            pack.stats.times["engine started"] = self._began
            self.stats = pack.stats
        with self.changed:
            for number, indices in pack.by_stream():
                stream = self.streams.get(number)
                if stream:
                    stream.outstanding -= len(indices)
                    stream.arrived.append((pack, indices))
            self.changed.notify_all()

    def _keep_output(self, output: IO[bytes]) -> bytes:
        """Keeps the last lines of what the process prints; empty at its end."""
        with contextlib.suppress(BlockingIOError):
            data = os.read(output.fileno(), 1 << 16)
            self._output = (self._output + data)[-OUTPUT_BYTES:]
            return data
        return b""

    def _keep_rest(self, output: IO[bytes]) -> None:
        while self._keep_output(output):
            pass

    def _death(self, process: subprocess.Popen[bytes]) -> BatchrunError:
        if self._stopped:
            return EngineDied("the engine was stopped")
        kind, when = (EngineDied, "") if self.stats.pid else (EngineNotLoaded, " while its model was loaded")
        try:
            status = process.wait(STOP_SECONDS)
        except subprocess.TimeoutExpired:
            return kind(f"the engine's process closed its connection{when}")
        self._keep_rest(cast(IO[bytes], process.stdout))
        how = f"signal {-status} ({signal.Signals(-status).name})" if status < 0 else f"exit status {status}"
        if error := error_line(self._lines):
            said = f": {error}"
        else:
            said = f", its last output: {line}" if (line := last_line(self._lines)) else ""
        fix = "if the kernel ran out of memory, smaller batches help" if status == -signal.SIGKILL else ""
        return kind(f"engine process ended with {how}{when}{said}", fix=fix)

    @property
    def _lines(self) -> list[str]:
        return lines_of(self._output.decode(errors="replace"))


def _collect(requests: Iterator[Request | None], room: int) -> tuple[list[Request], bool]:
    """A batch of at most `room` requests that are waiting now, and whether more may come."""
    batch: list[Request] = []
    tokens = 0
    for request in requests:
        if request is None:
            return batch, True
        batch.append(request)
        tokens += len(request.token_ids)
        if len(batch) == room or tokens >= PACK_TOKENS:
            return batch, True
    return batch, False


def _start(descriptor: int, env: dict[str, str]) -> subprocess.Popen[bytes]:
    # Not multiprocessing: a Dask worker may be daemonic, and its children would import the user's __main__
    # again.
    process = subprocess.Popen(
        [sys.executable, "-m", "batchrun.engine.server", str(descriptor), str(os.getpid())],
        env=_environment() | env,
        pass_fds=[descriptor],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    os.set_blocking(cast(IO[bytes], process.stdout).fileno(), False)
    return process


def _environment() -> dict[str, str]:
    """The worker's own, less what a Dask nanny sets for a worker's sake and costs a model dearly: one thread for
    each library, and an allocator that hands every large tensor's memory back to the kernel."""
    threads = str(available_cores())
    inherited = {name: value for name, value in os.environ.items() if name != "MALLOC_TRIM_THRESHOLD_"}
    return inherited | {
        "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        "OMP_NUM_THREADS": threads,
        "MKL_NUM_THREADS": threads,
        "OPENBLAS_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
    }


def available_cores() -> int:
    """CPU cores that this process may use, a container's quota (cgroup v2) included."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        cores = min(cores, max(1, math.ceil(int(quota) / int(period))))  # "max" is no number: no quota
    return cores
