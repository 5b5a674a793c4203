"""Ctrl-C, SIGTERM and SIGHUP: in every phase of a command, the process ends within seconds, with one code.

Installed before anything heavy is imported, so nothing heavy is imported here.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

# Seconds that a stopped process has to end by itself; at least so many once its tasks have staged what they held.
GRACE = 4.0
GRACE_AFTER_STAGING = 1.0

# Seconds after which an interrupt that a finalizer swallowed comes again.
AGAIN = 0.01

# Supervisors such as `timeout` signal the process and then its whole group: it comes twice, and means one stop.
SAME_STOP = 0.5

STAGING = "stopping: staging what is finished; once more to stop at once"
AT_ONCE = "stopped at once"
GOES_ON = "the same command goes on from there"

stop = threading.Event()


def silent(text: str = "") -> None:
    """Nothing is left to say."""


# What the process says where the main thread does not come back in time.
last_words: Callable[[], None] = silent
# Says to a program that reads standard output, and to nobody else, why the command ends at once.
tell_program: Callable[[str], None] = silent
# For its last words, too: whether the command, given again, goes on from where it was stopped; and what is safe, once
# that is known.
resumable = False
safe = ""

_lock = threading.Lock()
_exit_code = 4
_leaving: int | None = None
_attended = 0
_swallowed = False
_stopped_at = float("inf")
_end_by = float("inf")


def install() -> None:
    """Hooks the signals in. A SIGHUP that is ignored (`nohup`) stays ignored."""
    signal.signal(signal.SIGINT, _handle)
    signal.signal(signal.SIGTERM, _handle)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        signal.signal(signal.SIGHUP, _handle)
    sys.unraisablehook = _interrupt_again


@contextmanager
def attended() -> Iterator[None]:
    """Inside, somebody looks at `stop` by himself; elsewhere the first signal raises KeyboardInterrupt."""
    global _attended, _end_by
    _attended += 1
    try:
        yield
    finally:
        _attended -= 1
        if stop.is_set():
            _end_by = max(_end_by, time.monotonic() + GRACE_AFTER_STAGING)


def decided(exit_code: int) -> None:
    """The data is as it will be: whatever still interrupts the process, this is its exit code."""
    global _exit_code
    _exit_code = exit_code


def exit_code() -> int:
    """What an interrupted process ends with."""
    return _exit_code


def leave(exit_code: int) -> None:
    """All is done and said: a signal that comes now ends the process with this code, and interrupts nothing."""
    global _leaving
    _leaving = exit_code


def _handle(number: int, frame: object) -> None:
    """The first one lets tasks stage what they hold, or interrupts whatever else goes on; the second one ends the
    process now.

    Both leave a state that the same command goes on from: workers and engines end with their parent, and a lease
    whose process is gone is taken over.
    """
    global _end_by, _stopped_at, _swallowed
    if _leaving is not None:
        os._exit(_leaving)
    now = time.monotonic()
    if _swallowed:
        _swallowed = False
        raise KeyboardInterrupt
    if stop.is_set():
        if now - _stopped_at < SAME_STOP:
            return
        text = f"{AT_ONCE}: what is staged is safe; {GOES_ON}" if resumable else AT_ONCE
        _say(text)
        with suppress(Exception):
            tell_program(text)
        os._exit(_exit_code)
    stop.set()
    _stopped_at, _end_by = now, now + GRACE
    threading.Thread(target=_end_in_time, name="batchrun-stop", daemon=True).start()
    if not _attended:
        raise KeyboardInterrupt
    _say(STAGING)


def _interrupt_again(found: sys.UnraisableHookArgs) -> None:
    """Python drops what is raised in a finalizer or in a callback of its garbage collection, and prints a traceback.
    Of an interrupt there is nothing to be said, and it was meant for what ran below; nor of what such a callback finds
    half done after it."""
    global _swallowed
    if not stop.is_set():
        sys.__unraisablehook__(found)
        return
    if not issubclass(found.exc_type, KeyboardInterrupt):
        return
    _swallowed = True
    main = threading.main_thread().ident
    assert main is not None
    again = threading.Timer(AGAIN, signal.pthread_kill, (main, signal.SIGTERM))
    again.daemon = True
    again.start()


def _say(text: str) -> None:
    # The live view has put itself in stderr's place; it may be amid a write of its own, and the terminal gone.
    with suppress(RuntimeError, OSError, ValueError):
        print(text, file=sys.stderr, flush=True)


def _end_in_time() -> None:
    """Ends the process where its main thread hangs: in a library's call, a connection, an exit handler."""
    while _attended or time.monotonic() < _end_by:
        time.sleep(0.05)
    with _lock, suppress(Exception):
        last_words()
    os._exit(_exit_code)
