"""A deadline for every request to a store: a client's own timeouts bound the wait for a byte, not for the answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any, Generic, TypeVar, cast

from batchrun import signals

T = TypeVar("T")

# Seconds for an answer, and bytes per second that any store worth waiting for sends or takes.
REQUEST = 30.0
RATE = 1 << 20
# Seconds for one whose size nobody knows: a listing of many pages, an object read as a whole.
UNSIZED = 300.0

# The same once the process, or the task, was told to stop: nothing but what is to be saved is waited for.
REQUEST_AT_STOP = 1.0
SAVING_AT_STOP = 1.5
RATE_AT_STOP = 4 << 20

# Seconds between two looks at whether to stop.
LOOK = 0.1

Told = Callable[[], bool]

_told_to_stop: ContextVar[Told] = ContextVar("told_to_stop", default=signals.stop.is_set)


class DeadlineExceeded(TimeoutError):
    """A request was given up. What it does in the end is not known, as with any lost acknowledgement."""


def told_to_stop() -> bool:
    """Whether what runs here (a task, a run, the process) was told to stop, so that nothing is to be waited for."""
    return _told_to_stop.get()()


@contextmanager
def until(told: Told) -> Iterator[None]:
    """Inside, `told()` says whether to stop."""
    token = _told_to_stop.set(told)
    try:
        yield
    finally:
        _told_to_stop.reset(token)


def sized(size: int) -> float:
    """Seconds for a request that moves so many bytes."""
    return REQUEST + size / RATE


def within(seconds: float, call: Callable[[], T], at_stop: float = REQUEST_AT_STOP) -> T:
    """What `call()` gives, in a thread of its own that is left behind after `seconds`, or `at_stop` after the stop.

    Raises:
        DeadlineExceeded: it took longer.
        Exception: whatever `call` raises.
    """
    request = _Request(call)
    deadline, stopped = time.monotonic() + seconds, False
    while not request.done.wait(LOOK):
        if not stopped and told_to_stop():
            stopped, deadline = True, min(deadline, time.monotonic() + at_stop)
        if time.monotonic() >= deadline:
            raise DeadlineExceeded("no complete answer in time")
    return request.result()


def pause(seconds: float) -> None:
    """Sleeps, but not on once told to stop."""
    deadline = time.monotonic() + seconds
    while (left := deadline - time.monotonic()) > 0 and not told_to_stop():
        time.sleep(min(left, LOOK))


class _Request(Generic[T]):
    # A thread each: one that hangs is lost to a pool, and a pool's threads keep the process from ending.
    def __init__(self, call: Callable[[], T]) -> None:
        self.done = threading.Event()
        self._call = call
        self._value: T | None = None
        self._error: BaseException | None = None
        run = partial(copy_context().run, self._run)
        threading.Thread(target=run, name="batchrun-request", daemon=True).start()

    def _run(self) -> None:
        try:
            self._value = self._call()
        except BaseException as error:
            self._error = error
        finally:
            self.done.set()

    def result(self) -> T:
        if self._error is not None:
            raise self._error
        return cast(T, self._value)


class TimedFile:
    """A remote file open for reading, each of whose reads has a deadline."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def read(self, size: int = -1) -> bytes:
        """At most `size` bytes, all that is left by default. Raises DeadlineExceeded."""
        seconds = sized(size) if size >= 0 else UNSIZED
        data: bytes = within(seconds, lambda: self._file.read(size))
        return data

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
