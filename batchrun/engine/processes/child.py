"""One process of an engine as its parent sees it, and the streams of requests that share it."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection, wait
from typing import IO, Any, cast

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.processes.last_words import error_line, last_line, lines_of
from batchrun.engine.processes.launch import start
from batchrun.engine.processes.standby import Adopted, adopt
from batchrun.engine.processes.wire import Cancel, CompletionPack, Failed, Recall, Recalled, RequestPack
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.errors import BatchrunError, EngineDied, EngineError, EngineNotLoaded

PACK_ROWS = 512
# A caller gets None at least so often, and can flush, or look whether it is still wanted.
PATIENCE_SECONDS = 0.5
ABORT_SECONDS = 2.0
STOP_SECONDS = 5.0
OUTPUT_BYTES = 1 << 16
NO_PLACES: NDArray[np.intp] = np.empty(0, np.intp)


class Stream:
    """One caller of `generate`: what it has sent, and what came back for it."""

    def __init__(self, child: Child, number: int) -> None:
        self.child = child
        self.number = number
        self.sent = 0
        self.pending: dict[int, int] = {}
        # Whether the answer to a recall is still to come.
        self.recalling = False
        # Guarded by the child's lock: rows reserved or sent and not yet back, packs to be taken, and whether the caller
        # is not to wait for any now.
        self.outstanding = 0
        self.woken = False
        self.arrived: deque[tuple[CompletionPack | Recalled, NDArray[np.intp]]] = deque()

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
            if timeout and not self.arrived and not self.woken and not self.child.failure:
                self.child.changed.wait(timeout)
            self.woken = False
            packs = list(self.arrived)
            self.arrived.clear()
        for pack, indices in packs:
            if isinstance(pack, Recalled):
                self.recalling = False
                continue
            yield from pack.unpack(indices, self.pending)
        if not packs:
            self.child.check()
            if timeout:
                yield None

    def recall(self, rows: Sequence[Sequence[int]], work: Sequence[float], most: float) -> None:
        """Asks for rows back that the engine has not begun with, see `Recall`: by the ids of each row's requests. Once
        it is not `recalling` any more, they have come as "cancelled"."""
        # One that still loads has nothing to say.
        if not self.child.stats.pid:
            return
        places = {number: place for place, number in self.pending.items()}
        # Those of which nothing has come back yet.
        whole = [i for i, numbers in enumerate(rows) if all(number in places for number in numbers)]
        wanted = [[places[number] for number in rows[i]] for i in whole]
        self.recalling = True
        self.child.send(Recall(self.number, wanted, [work[i] for i in whole], most))

    def abort(self) -> Iterator[Completion | None]:
        """What comes of a cancelled stream's rows in the time that there is."""
        self.child.send(Cancel(self.number, keep=True))
        deadline = time.monotonic() + ABORT_SECONDS
        while self.pending and (left := deadline - time.monotonic()) > 0:
            yield from self.take(min(left, PATIENCE_SECONDS))

    def close(self) -> None:
        """Ends the stream; rows that were not answered are dropped."""
        with self.child.changed:
            del self.child.streams[self.number]
            unanswered = self.outstanding > 0 and not self.child.failure
            self.child.changed.notify_all()
        if unanswered:
            # A process that ended has dropped the rows by itself.
            with contextlib.suppress(BatchrunError):
                self.child.send(Cancel(self.number))


class Child:
    """One engine process, and the thread that starts it, routes what it says and outlives it.

    That thread must be the one that starts the process: the parent-death signal fires when it ends.
    """

    def __init__(self, spec: EngineSpec, env: dict[str, str], window: int, launch: int) -> None:
        self.window = window
        self._launch = launch
        self.stats = EngineStats()
        self.failure: BatchrunError | None = None
        self.changed = threading.Condition()
        self.streams: dict[int, Stream] = {}
        self._opened = 0
        self._began = time.time()
        self._output = b""
        self._stopped = False
        self._process: subprocess.Popen[bytes] | Adopted | None = None
        self._sending = threading.Lock()
        self._started = threading.Event()
        theirs: socket.socket | None = None
        # One that stands by has an environment of its own.
        if not env and (adopted := adopt()):
            self._connection, self._process = adopted
            self._began = self._process.began
        else:
            ours, theirs = socket.socketpair()
            self._connection = Connection(ours.detach())
        self._receiver = threading.Thread(target=self._live, args=(spec, env, theirs), daemon=True)
        self._receiver.start()
        self._started.wait()

    @property
    def used(self) -> bool:
        """Whether any stream was ever opened."""
        return self._opened > 0

    def open_stream(self, is_first: bool = False) -> Stream:
        """A stream for one more caller; whether its rows go before those of all streams that are there."""
        with self.changed:
            self._opened += 1
            # The lowest number goes first.
            number = -self._opened if is_first else self._opened
            stream = self.streams[number] = Stream(self, number)
            return stream

    def send(self, message: RequestPack | Cancel | Recall) -> None:
        """Sends to the process, one caller at a time.

        Raises:
            EngineDied: it does not listen any more.
            BatchrunError: what it ended with.
        """
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
        """Kills the process and waits for its last words."""
        self._stopped = True
        if self._process:
            self._process.kill()
        self._receiver.join(STOP_SECONDS)

    @property
    def pid(self) -> int | None:
        """The process, None before it is started."""
        return self._process.pid if self._process else None

    def _live(self, spec: EngineSpec, env: dict[str, str], theirs: socket.socket | None) -> None:
        try:
            if theirs is not None:
                with theirs:
                    self._process = start(theirs.fileno(), env)
            assert self._process is not None
            # First of all, and by this thread: large tables take until the process reads. What ended meanwhile is
            # told below.
            with self._sending, contextlib.suppress(OSError):
                self._started.set()
                self._connection.send(spec)
            failure = self._route(self._process)
        except Exception as error:
            failure = EngineNotLoaded(f"the engine's process could not be run: {error!r}")
        if isinstance(failure, EngineError) and not self._stopped:
            failure.launch, failure.output = self._launch, self._lines
        with self.changed:
            self.failure = failure
            self.changed.notify_all()
        self._started.set()

    def _route(self, process: subprocess.Popen[bytes] | Adopted) -> BatchrunError:
        """Delivers until the process has ended; gives back what it ended with."""
        assert process.stdout is not None
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
                        # Not waited for: the end of a process whose device hangs may not come by itself.
                        return message.error
                    elif isinstance(message, Recalled):
                        self._deliver_recalled(message)
                    else:
                        self._deliver(message)
        except (EOFError, OSError):
            return self._death(process)
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

    def _deliver_recalled(self, message: Recalled) -> None:
        with self.changed:
            if stream := self.streams.get(message.stream):
                stream.arrived.append((message, NO_PLACES))
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

    def _death(self, process: subprocess.Popen[bytes] | Adopted) -> BatchrunError:
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
        fix = "if the kernel killed it for memory, smaller batches help" if status == -signal.SIGKILL else ""
        return kind(f"engine process ended with {how}{when}{said}", fix=fix)

    @property
    def _lines(self) -> list[str]:
        return lines_of(self._output.decode(errors="replace"))
