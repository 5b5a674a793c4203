"""The other ranks as rank 0 sees them: processes that are told each batch, and say whether they could begin it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from batchrun.engine.launch import environment
from batchrun.engine.loading import load_config
from batchrun.engine.paged import devices
from batchrun.engine.paged.architecture import Unsupported
from batchrun.engine.paged.parallel.group import Group, device_of, place_to_meet
from batchrun.engine.paged.parallel.messages import (
    PULSE_SECONDS,
    SILENT_SECONDS,
    Done,
    Failure,
    Member,
    Pulse,
)
from batchrun.engine.paged.parallel.sharding import Sharding
from batchrun.engine.paged.pending import Pending
from batchrun.engine.paged.work import Work
from batchrun.engine.protocol import EngineSpec
from batchrun.errors import EngineError, ModelError, one_line

WORK_SECONDS = 50
"""On a GPU no batch takes so long to begin with or to be done: a collective waits for a rank that will not come."""
GRACE_SECONDS = 5.0
"""In which rank 0 may tell an error of all ranks in its own words."""
STOP_SECONDS = 5.0


class Ranks:
    """Ranks 1 and up of an engine. If one ends, fails or says nothing for `SILENT_SECONDS`, so does this process: what
    it waits for on its device would never come."""

    def __init__(self, spec: EngineSpec, page_size: int, config: Any = None) -> None:
        """Starts them; they load their shares by themselves, see `load_share`. Call in the thread whose end is to be
        theirs.

        Raises:
            Unsupported: the model cannot be divided over `spec.gpus`, or there are fewer.
            ModelError: it has adapters, which are not divided.
        """
        if spec.adapter or spec.adapters:
            raise ModelError(
                "adapters are not divided over several GPUs", spec.model_path, "set engine.gpus: 1"
            )
        if spec.device.startswith("cuda") and torch.cuda.device_count() < spec.gpus:
            raise Unsupported(f"only {torch.cuda.device_count()} of {spec.gpus} GPUs are visible")
        # What cannot be divided is told here, before any process is started.
        Sharding(config or load_config(spec), 0, spec.gpus)
        self._meeting, store = place_to_meet()
        self.group = Group(0, spec.gpus, store, device_of(spec, 0))
        self._closed = threading.Event()
        self._working = 0
        self._others: list[_Rank] = []
        for rank in range(1, spec.gpus):
            self._others.append(_Rank(self, Member(spec, page_size, rank, store, config), self._meeting))
        threading.Thread(target=self._watch, daemon=True).start()

    def launch(self, work: Work, run: Callable[[Work], Pending]) -> Pending:
        """Has every rank run a batch, this one by `run`, and waits until all have begun.

        Raises:
            EngineError: it did not fit. Warming up has shown that the largest batches do, so that somebody else has
                taken the memory; the other ranks are in the middle of it, so that it cannot be made smaller.
        """
        with self.waiting():
            for other in self._others:
                other.send(work.for_ranks())
            try:
                pending = run(work)
            except (RuntimeError, MemoryError) as error:
                raise EngineError(f"rank 0 of {self.group.size} failed: {one_line(error)}") from error
            for other in self._others:
                other.done.get()
        return pending

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """What is done inside waits for the other ranks, and ends with the process if that is for too long."""
        self._working = 1
        try:
            yield
        finally:
            self._working = 0

    @property
    def closed(self) -> bool:
        """Whether their end is no failure."""
        return self._closed.is_set()

    def close(self) -> None:
        """Ends them."""
        self._closed.set()
        for other in self._others:
            other.stop()
        self.group.leave()
        os.close(self._meeting)

    def fail(self, reason: str) -> None:
        """Ends this process, and the other ranks with it. Its last line is the reason."""
        if self._closed.wait(GRACE_SECONDS):
            return
        for other in self._others:
            other.kill()
        print(f"RankError: {reason}", file=sys.stderr, flush=True)
        os._exit(1)

    def _watch(self) -> None:
        # Counted, not measured: while this process itself is paused, nobody's silence is.
        while not self._closed.wait(PULSE_SECONDS):
            for other in self._others:
                other.send(Pulse())
                other.silent += PULSE_SECONDS
                if other.silent > SILENT_SECONDS:
                    self.fail(f"{other.name} has said nothing for {SILENT_SECONDS} s")
            if self._working and devices.is_gpu(self.group.device):
                self._working += PULSE_SECONDS
                if self._working > WORK_SECONDS:
                    self.fail(
                        f"a batch was not done within {WORK_SECONDS} s: a GPU hangs, or one waits for another"
                    )


class _Rank:
    """One of them: its process, and a thread that hears what it says."""

    def __init__(self, ranks: Ranks, member: Member, meeting: int) -> None:
        self.name = f"rank {member.rank} of {member.spec.gpus}"
        self.silent = 0
        self.done: SimpleQueue[Done] = SimpleQueue()
        self._ranks = ranks
        self._sending = threading.Lock()
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "batchrun.engine.rank", str(theirs.fileno()), str(os.getpid())],
                env=environment(),
                pass_fds=[theirs.fileno(), meeting],
                stdin=subprocess.DEVNULL,
            )
        self.send(member)
        threading.Thread(target=self._hear, daemon=True).start()

    def send(self, message: Any) -> None:
        """One caller at a time. What a process that has ended would have been sent is dropped: its end is heard of."""
        with self._sending, suppress(OSError):
            self._connection.send(message)

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def stop(self) -> None:
        """Ends it and waits for that."""
        self._process.kill()
        self._process.wait(STOP_SECONDS)
        self._connection.close()

    def _hear(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self.silent = 0
                if isinstance(message, Done):
                    self.done.put(message)
                elif isinstance(message, Failure):
                    self._ranks.fail(f"{self.name} failed: {message.reason}")
        except (EOFError, OSError):
            if not self._ranks.closed:
                status = self._process.wait()
                how = (
                    f"signal {-status} ({signal.Signals(-status).name})"
                    if status < 0
                    else f"exit status {status}"
                )
                self._ranks.fail(f"{self.name} ended with {how}")
