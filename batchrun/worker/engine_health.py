"""Whether a worker's engine gets rows done: what it is trusted with after it has ended, and when it is given up."""

from __future__ import annotations

import copy
import socket
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import numpy as np
from numpy.typing import NDArray

from batchrun.errors import EngineError, EngineOutOfMemory
from batchrun.storage import Folder
from batchrun.telemetry import engine_log
from batchrun.telemetry.redact import Redactor

# Of a worker's engine in a row that finish no row: it is not loaded again in that run.
LOADS = 3
TURN_SECONDS = 0.5


class EngineHealth:
    """A worker's engine in one run, for all tasks of the worker together.

    A load is fruitless if its process ends before a row of it is durable, whatever partition it worked on. After the
    first such load, rows come in turn: one row alone has to be finished before the engine gets the rest. So a row
    that kills its engine costs no more than itself, and an engine that always fails is known after LOADS loads.
    """

    def __init__(self, run: str, folder: Folder, secrets: Iterable[str]) -> None:
        self.run = run
        self._folder, self._redact = folder, Redactor()
        self._redact.add(secrets)
        self.fruitless = 0
        # Whether a fresh engine failed the same rows again: then it is the rows, and no engine is renewed for a few.
        self.rows_to_blame = False
        self._last: EngineError | None = None
        # By number of the launch: what a message says of its output.
        self._ended: dict[int, str] = {}
        self._fruitful: set[int] = set()
        # Rows that were to prove the engine, since it last did.
        self._tried: set[tuple[int, int]] = set()
        self._lock, self._turn = threading.Lock(), threading.Lock()

    def check(self) -> None:
        """Raises what the engine ended with last, if it is given up."""
        if self.fruitless >= LOADS and self._last is not None:
            refusal = copy.copy(self._last)
            refusal.refused = True
            raise refusal

    @contextmanager
    def in_doubt(self, wanted: Callable[[], bool]) -> Iterator[bool]:
        """Waits its turn; whether the engine has to prove itself first, in which case others wait meanwhile."""
        while not self._turn.acquire(timeout=TURN_SECONDS):
            if not wanted():
                yield False
                return
        try:
            self.check()
            yield self.fruitless > 0
        finally:
            self._turn.release()

    def progress(self, launch: int | None) -> None:
        """Rows that this launch of the engine has finished are durable."""
        with self._lock:
            self._fruitful.add(launch or 0)
            self.fruitless = 0
            self._tried.clear()

    def one_of(self, partition: int, rows: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """One of the partition's `rows` for the engine to prove itself with, never the same after a fruitless load."""
        some = np.flatnonzero(rows).tolist()
        new = [row for row in some if (partition, row) not in self._tried] or some
        row = new[len(new) // 2]
        self._tried.add((partition, row))
        one = np.zeros_like(rows)
        one[row] = True
        return one

    def ended(self, error: EngineError, worker: str, counts: bool = True) -> EngineError:
        """The error for the driver: where it happened, where the output is, and the count so far.

        A process ends once, however many tasks it takes along. One that had to do with a single row `counts` only if
        the row cannot be to blame, and one without memory never: the next is smaller, and there is a smallest.
        """
        counts = counts and not isinstance(error, EngineOutOfMemory)
        with self._lock:
            if error.launch is not None and error.launch not in self._ended:
                self._ended[error.launch] = self._save(error, worker)
                self.fruitless += counts and error.launch not in self._fruitful
            said = "" if error.launch is None else self._ended[error.launch]
            told = type(error)(error.what + said, worker, error.fix)
            told.launch, told.fruitless = error.launch, self.fruitless
            self._last = told
            return copy.copy(told)

    def _save(self, error: EngineError, worker: str) -> str:
        when = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        title = f"{when} {socket.gethostname()} {worker}: {error.what}"
        key = engine_log.save(self._folder, self.run, title, error.output, self._redact)
        return f" (its output: {key})" if key else ""
