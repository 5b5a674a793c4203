"""The other ranks as rank 0 sees them: processes that are told each batch, and say whether they could begin it."""

from __future__ import annotations

import os
import pickle
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

from batchrun.engine.out_of_memory import is_out_of_memory
from batchrun.engine.paged.attention.architecture import Unsupported
from batchrun.engine.paged.device.group import Group, device_of, place_to_meet
from batchrun.engine.paged.device.pending import Pending
from batchrun.engine.paged.device.work import Work
from batchrun.engine.paged.parallel.sharding import Sharding
from batchrun.engine.processes.abort import abort
from batchrun.engine.processes.launch import die_with_thread, environment
from batchrun.engine.processes.rank_messages import (
    PULSE_SECONDS,
    SILENT_SECONDS,
    STUCK_SECONDS,
    Done,
    Failure,
    Member,
    Pulse,
)
from batchrun.engine.protocol import EngineSpec
from batchrun.engine.weights.loading import load_config
from batchrun.errors import EngineDied, EngineError, EngineOutOfMemory, one_line

PROGRAM = "batchrun.engine.rank"
"""What the other ranks run."""
GRACE_SECONDS = 5.0
"""In which rank 0 may tell an error of all ranks in its own words."""
STOP_SECONDS = 5.0


class Ranks:
    """Ranks 1 and up of an engine. If one ends, fails or says nothing for `SILENT_SECONDS`, or none gets on with what
    they are `waiting` for in `STUCK_SECONDS`, this process ends: it would never come.

    `cache_tokens`, once known, are those of the pages: an engine that follows on one without memory has no more.
    """

    def __init__(self, spec: EngineSpec, page_size: int, config: Any = None) -> None:
        """Starts them; they load their shares by themselves, see `load_share`. Call in the thread whose end is to be
        theirs.

        Raises:
            Unsupported: the model cannot be divided over `spec.gpus`, or there are fewer.
        """
        if spec.device.startswith("cuda") and torch.cuda.device_count() < spec.gpus:
            raise Unsupported(f"only {torch.cuda.device_count()} of {spec.gpus} GPUs are visible")
        # What cannot be divided is told here, before any process is started.
        Sharding(config or load_config(spec), 0, spec.gpus)
        self._meeting, store = place_to_meet()
        self.group = Group(0, spec.gpus, store, device_of(spec, 0))
        self._closed = threading.Event()
        self.cache_tokens = 0
        self._waits_for = ""
        self._work: Work | None = None
        self._others: list[_Rank] = []
        pickled = pickle.dumps(config) if config else None
        members = [Member(spec, page_size, rank, store, pickled) for rank in range(1, spec.gpus)]
        self._others += [_Rank(self, member, self._meeting) for member in members]
        threading.Thread(target=self._watch, daemon=True).start()
        # Watched, since one that is paused by now may not read it all: tables of answers are large.
        for other, member in zip(self._others, members, strict=True):
            other.send(member)

    def launch(self, work: Work, run: Callable[[Work], Pending]) -> Pending:
        """Has every rank run a batch, this one by `run`, and waits until all have begun.

        Raises:
            EngineOutOfMemory: it did not fit. Warming up has shown that the largest batches do, so that somebody else
                has taken the memory.
            EngineError: it failed otherwise.
        """
        self._work = work
        with self.waiting("a batch"):
            for other in self._others:
                other.send(work.for_ranks())
            try:
                pending = run(work)
            except (RuntimeError, MemoryError) as error:
                name = f"rank 0 of {self.group.size}"
                raise self._failure(name, one_line(error), is_out_of_memory(error)) from error
            for other in self._others:
                other.done.get()
        return pending

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """What is done inside, by all ranks, ends with the process once none of them gets on with it."""
        self._waits_for = what
        try:
            yield
        finally:
            self._waits_for = ""

    @property
    def closed(self) -> bool:
        """Whether their end is no failure."""
        return self._closed.is_set()

    def wait_closed(self, seconds: float) -> bool:
        """Waits for that, at most so long; whether it is so."""
        return self._closed.wait(seconds)

    def close(self) -> None:
        """Ends them."""
        self._closed.set()
        for other in self._others:
            other.stop()
        self.group.leave()
        os.close(self._meeting)

    def fail(self, error: EngineError) -> None:
        """Ends this process, and the other ranks with it."""
        if self._closed.wait(GRACE_SECONDS):
            return
        for other in self._others:
            other.kill()
        abort(error)

    def failed(self, name: str, failure: Failure) -> None:
        """One of them did, in the middle of a batch or while it was loading: ends all."""
        self.fail(self._failure(name, failure.reason, failure.out_of_memory))

    def _failure(self, name: str, reason: str, out_of_memory: bool) -> EngineError:
        """What the group ends with when a rank fails. The others are in the middle of the batch and wait for its sums,
        so that a smaller one can only be tried by those that follow."""
        smaller = self._work.smaller if out_of_memory and self._work else None
        if smaller is None:
            return EngineError(f"{name} failed: {reason}")
        told = ", ".join(f"engine.{option} is {number} from now on" for option, number in smaller.items())
        fix = "a smaller engine.memory_fraction leaves room for others on the GPU"
        error = EngineOutOfMemory(f"{name} is out of memory, {told} ({reason})", fix=fix)
        # What smaller batches leave is not for pages, as it would be measured to be.
        error.options = {**smaller, "cache_tokens": self.cache_tokens}
        return error

    def _watch(self) -> None:
        # Counted, not measured: while this process itself is paused, nobody's silence is.
        stuck, before = 0, [0]
        while not self._closed.wait(PULSE_SECONDS):
            for other in self._others:
                other.silent += PULSE_SECONDS
                if other.silent > SILENT_SECONDS:
                    self.fail(EngineDied(f"{other.name} has said nothing for {SILENT_SECONDS} s"))
            progress = [self.group.progress.look(), *(other.progress for other in self._others)]
            waits_for = self._waits_for
            stuck = stuck + PULSE_SECONDS if waits_for and progress == before else 0
            before = progress
            if stuck > STUCK_SECONDS:
                what = f"none of {self.group.size} ranks got on with {waits_for} for {STUCK_SECONDS} s"
                self.fail(EngineDied(f"{what}: a device or a store hangs, or ranks wait for each other"))


class _Rank:
    """One of them: its process, and a thread that hears what it says."""

    def __init__(self, ranks: Ranks, member: Member, meeting: int) -> None:
        self.name = f"rank {member.rank} of {member.spec.gpus}"
        self.silent = self.progress = 0
        self.done: SimpleQueue[Done] = SimpleQueue()
        self._ranks = ranks
        self._sending = threading.Lock()
        ours, theirs = socket.socketpair()
        self._connection = Connection(ours.detach())
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", PROGRAM, str(theirs.fileno()), str(os.getpid())],
                env=environment(),
                pass_fds=[theirs.fileno(), meeting],
                stdin=subprocess.DEVNULL,
                preexec_fn=die_with_thread,
            )
        threading.Thread(target=self._pulse, daemon=True).start()
        threading.Thread(target=self._hear, daemon=True).start()

    def send(self, message: Any) -> None:
        """One caller at a time, which may wait for as long as the process reads nothing. What one that has ended would
        have been sent is dropped: its end is heard of."""
        with self._sending, suppress(OSError):
            self._connection.send(message)

    def kill(self) -> None:
        """Ends it at once."""
        self._process.kill()

    def stop(self) -> None:
        """Ends it and waits for that."""
        self._process.kill()
        self._process.wait(STOP_SECONDS)
        # Not while something is being sent, which ends with the process.
        with self._sending:
            self._connection.close()

    def _pulse(self) -> None:
        # Apart from `_watch`, which must not wait for a process that reads nothing.
        while not self._ranks.wait_closed(PULSE_SECONDS):
            self.send(Pulse())

    def _hear(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self.silent = 0
                if isinstance(message, Pulse):
                    self.progress = message.progress
                elif isinstance(message, Done):
                    self.done.put(message)
                elif isinstance(message, Failure):
                    self._ranks.failed(self.name, message)
        except (EOFError, OSError):
            if not self._ranks.closed:
                status = self._process.wait()
                how = (
                    f"signal {-status} ({signal.Signals(-status).name})"
                    if status < 0
                    else f"exit status {status}"
                )
                self._ranks.fail(EngineDied(f"{self.name} ended with {how}"))
