"""Whether a process gets on with its work, however slowly, or waits for something that may never come."""

from __future__ import annotations

import sys
import threading
from contextlib import suppress
from pathlib import Path

_STATUS = Path("/proc/self/status")


class HostProgress:
    """Of the thread that makes it, and of its process.

    A thread that waits stays at one place of its Python code; one that imports, traces, compiles or launches does not.
    And in a process that reads weights, in whichever thread and from however slow a store, more pages of files come to
    memory. Neither its CPU time nor its own memory says anything: what waits for a device may spin, and touch some.
    That counts until `has_read`: from then on files may be read for other reasons.
    """

    def __init__(self) -> None:
        self._thread, self._reads = threading.get_ident(), True
        self._place: tuple[int, int] | None = None
        self._read = 0
        self._count = 0

    def has_read(self) -> None:
        """All weights are where they belong."""
        self._reads = False

    def look(self) -> int:
        """A number that has grown if anything got on since the last look. In another thread, always the same one."""
        frame = sys._current_frames().get(self._thread)
        place = id(frame), frame.f_lasti if frame else 0
        read = _read_of_files() if self._reads else 0
        self._count += place != self._place or read > self._read
        self._place, self._read = place, read
        return self._count


def _read_of_files() -> int:
    """KiB of files that this process has in memory, see proc_pid_status(5); 0 where the kernel does not say."""
    # No Linux, or /proc is not there.
    with suppress(OSError, IndexError, ValueError):
        return int(_STATUS.read_text().partition("RssFile:")[2].split()[0])
    return 0
