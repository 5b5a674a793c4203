"""The engine in a process of its own: its crash, memory or busy loop is never the worker's."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Protocol, cast

from batchrun.engine.processes.child import PATIENCE_SECONDS, Child, Stream
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.errors import EngineOutOfMemory

PACK_TOKENS = 1 << 18
STARVED_SECONDS = 0.02


class Recalls(Protocol):
    """Who asks a running `generate` for requests back."""

    def serve(self, recall: Callable[[Sequence[Sequence[int]], Sequence[float], float], None]) -> None:
        """Called again and again while no recall is out: the last one has been answered then. May `recall`, once: by
        the ids of each row's requests the rows that are wanted, the work of each, and how much of it is wanted."""
        ...


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
        self._child: Child | None = None
        self._tired = 0
        # Processes that were started, the present one included.
        self.launches = 0
        self._users = 0

    def generate(
        self,
        requests: Iterator[Request | None],
        wanted: Callable[[], bool] = lambda: True,
        recalls: Recalls | None = None,
        is_first: bool = False,
    ) -> Generator[Completion | None, None, None]:
        """A completion for each request exactly once, in any order; may run in several threads at once.

        Pulls `requests` only while there is room, of which every running call gets an equal share. Yields
        None when nothing has finished for half a second. Once `wanted()` is false, pulls no more, and gives back
        what is in flight as it is ("cancelled"), as far as that comes in two seconds. Closing the generator drops
        the requests not yet answered. `recalls` asks for requests back: `wake` has it looked at.
        With `is_first` the engine begins with these before it begins with more of other calls'.

        Raises:
            EngineDied: the engine's process ended by itself; the next call starts a new one.
            EngineNotLoaded: it ended, or failed, before its model was loaded.
            EngineError, ModelError: what the engine raised while loading or generating.
        """
        while (stream := self._open_stream(is_first)) is None:
            if not wanted():
                return
            time.sleep(PATIENCE_SECONDS)
            yield None
        try:
            more = True
            while (more or stream.pending) and wanted():
                if recalls is not None and not stream.recalling:
                    recalls.serve(stream.recall)
                patience = PATIENCE_SECONDS
                # What is asked for next might have to do with what is about to come back.
                room = stream.reserve() if more and not stream.recalling else 0
                if room:
                    batch, more = _collect(requests, room)
                    stream.send(batch, room)
                    patience = STARVED_SECONDS if more and not batch else 0
                yield from stream.take(patience)
            if stream.pending:
                yield from stream.abort()
        finally:
            stream.close()

    def wake(self) -> None:
        """Has the running calls of `generate` look at their `recalls` now."""
        if child := self._child:
            with child.changed:
                for stream in child.streams.values():
                    stream.woken = True
                child.changed.notify_all()

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
        # It has just ended, or this is no Linux.
        with contextlib.suppress(OSError, IndexError, ValueError):
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

    def _open_stream(self, is_first: bool) -> Stream | None:
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
            return self._child.open_stream(is_first)

    def _launch(self) -> None:
        self.launches += 1
        if self._child and isinstance(self._child.failure, EngineOutOfMemory):
            self.spec = replace(self.spec, options={**self.spec.options, **self._child.failure.options})
        self._child = Child(self.spec, self.env, self.window, self.launches)


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
