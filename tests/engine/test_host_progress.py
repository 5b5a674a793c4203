"""Reading counts as getting on while weights are read; what a thread does that waits for a device does not."""

from __future__ import annotations

import hashlib
import mmap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from queue import SimpleQueue

import pytest

from batchrun.engine.processes.host_progress import HostProgress

# More than the kernel may count by itself on each of many cores.
BYTES = 8 << 20


@contextmanager
def _waiting(wait: Callable[[threading.Event], object]) -> Iterator[HostProgress]:
    """Of a thread that has come to where it waits."""
    made: SimpleQueue[HostProgress] = SimpleQueue()
    end = threading.Event()

    def run() -> None:
        made.put(HostProgress())
        wait(end)

    waiting = threading.Thread(target=run, daemon=True)
    waiting.start()
    progress = made.get()
    # At one place for so long: a busy machine stops it elsewhere for a moment.
    looks = [progress.look()]
    while len(looks) < 10 or looks[-1] != looks[-10]:
        time.sleep(0.05)
        looks.append(progress.look())
    yield progress
    end.set()


def _touch(memory: mmap.mmap) -> None:
    for start in range(0, len(memory), mmap.PAGESIZE):
        memory[start]


def test_pages_of_a_file_that_another_thread_reads_are_progress_until_the_weights_are_there(
    tmp_path: Path,
) -> None:
    with (tmp_path / "weights").open("w+b") as file, _waiting(threading.Event.wait) as progress:
        file.truncate(2 * BYTES)
        with mmap.mmap(file.fileno(), BYTES, prot=mmap.PROT_READ) as memory:
            before = progress.look()
            _touch(memory)
            assert progress.look() > before
        progress.look()
        progress.has_read()
        before = progress.look()
        with mmap.mmap(file.fileno(), BYTES, prot=mmap.PROT_READ, offset=BYTES) as memory:
            _touch(memory)
            assert progress.look() == before


@pytest.mark.parametrize(
    "wait",
    [
        threading.Event.wait,
        lambda _: time.sleep(10),
        # As CUDA waits by default: a core is busy, and no other thread is kept from running.
        lambda _: hashlib.pbkdf2_hmac("sha256", b"", b"", 6_000_000),
    ],
    ids=["blocked", "asleep", "spinning"],
)
def test_memory_that_is_touched_while_a_thread_waits_is_no_progress(
    wait: Callable[[threading.Event], object],
) -> None:
    with _waiting(wait) as progress:
        # Threads of other tests' clusters may read a file at that moment.
        assert not all(_grows_while_touching(progress) for _ in range(5))


def _grows_while_touching(progress: HostProgress) -> bool:
    before = progress.look()
    with mmap.mmap(-1, BYTES) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for start in range(0, BYTES, mmap.PAGESIZE):
            memory[start] = 1
        return progress.look() > before
