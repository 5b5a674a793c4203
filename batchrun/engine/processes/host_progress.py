"""Whether a process gets on with its work, however slowly, or waits for something that may never come."""

from __future__ import annotations

import resource
import sys
import threading


class HostProgress:
    """Of the thread that makes it, and of its process.

    A thread that waits stays at one place of its Python code; one that imports, traces, compiles or launches does not.
    And a process that reads weights, in whichever thread and from however slow a store, comes to memory that it had not
    touched before, page by page. That counts until `has_read`: from then on one that waits for a device may touch some,
    too.
    """

    def __init__(self) -> None:
        self._thread, self._reads = threading.get_ident(), True
        self._seen: tuple[int, int, int] | None = None
        self._count = 0

    def has_read(self) -> None:
        """All weights are where they belong."""
        self._reads = False

    def look(self) -> int:
        """A number that has grown if anything got on since the last look. In another thread, always the same one."""
        frame = sys._current_frames().get(self._thread)
        used = resource.getrusage(resource.RUSAGE_SELF)
        faults = used.ru_minflt + used.ru_majflt if self._reads else 0
        seen = id(frame), frame.f_lasti if frame else 0, faults
        self._count += seen != self._seen
        self._seen = seen
        return self._count
