"""Reading counts as getting on while weights are read, and not once they are there."""

from __future__ import annotations

import mmap
import threading
import time
from queue import SimpleQueue

from batchrun.engine.processes.host_progress import HostProgress

PAGE = mmap.PAGESIZE


def test_memory_that_another_thread_touches_is_progress_until_the_weights_are_there() -> None:
    made: SimpleQueue[HostProgress] = SimpleQueue()
    end = threading.Event()

    def wait() -> None:
        made.put(HostProgress())
        end.wait()

    waiting = threading.Thread(target=wait)
    waiting.start()
    try:
        progress = made.get()
        with mmap.mmap(-1, 2 * PAGE) as memory:
            before = progress.look()
            memory[0] = 1
            assert progress.look() > before
            progress.has_read()
            before = _once_it_waits(progress)
            memory[PAGE] = 1
            assert progress.look() == before
    finally:
        end.set()
        waiting.join()


def _once_it_waits(progress: HostProgress) -> int:
    """What it says once the thread has come to where it waits."""
    last, now = -1, progress.look()
    while now != last:
        time.sleep(0.05)
        last, now = now, progress.look()
    return now
