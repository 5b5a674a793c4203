"""A rank of an engine that fails as a real one may, while the others go on; `FAULTS` says how."""

from __future__ import annotations

import hashlib
import mmap
import os
import tempfile
import threading
import time
from typing import Any

from batchrun.engine import rank
from batchrun.engine.processes import rank_link

SILENT_SECONDS = "BATCHRUN_TEST_SILENT_SECONDS"
"""After which a rank and rank 0 give each other up."""
FAULTS = "BATCHRUN_TEST_RANK_FAULTS"
"""Words, each with a number: "rows 2" are the most that there is memory for to decode, "slow 3" the seconds that a
prompt takes that begins with SLOW, "read 3" those that a store takes to give the weights, "hangs 1" where it never gets
further: LOADING or WARMING_UP."""
LOADING, WARMING_UP = 1, 2
SLOW, STUCK = 257, 258
"""Tokens. The rank never takes part in the batch of a prompt that begins with STUCK."""
CHUNK = 1 << 20


class Faults:
    """What may happen while it loads, and before a batch."""

    def __init__(self) -> None:
        words = os.environ.get(FAULTS, "").split()
        self.numbers = dict(zip(words[::2], map(float, words[1::2]), strict=True))

    def loading(self) -> None:
        if self.numbers.get("hangs") == LOADING:
            hang()
        # As transformers has it: threads of its own read, and the one that loads waits for them.
        reader = threading.Thread(target=self._read)
        reader.start()
        reader.join()

    def _read(self) -> None:
        chunks = int(self.numbers.get("read", 0) / 0.05)
        with tempfile.TemporaryFile() as file:
            file.truncate((1 + chunks) * CHUNK)
            with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
                for page in range(0, chunks * CHUNK, mmap.PAGESIZE):
                    memory[page]
                    time.sleep(0.05 if page % CHUNK == 0 else 0)

    def warming_up(self) -> None:
        if self.numbers.get("hangs") == WARMING_UP:
            hang()

    def before(self, work: Any) -> None:
        import torch

        from batchrun.engine.paged.device.work import DecodeWork

        if isinstance(work, DecodeWork):
            if len(work.slots) > self.numbers.get("rows", len(work.slots)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return
        if STUCK in work.tokens[work.positions == 0]:
            hang()
        if SLOW in work.tokens[work.positions == 0]:
            until = time.monotonic() + self.numbers["slow"]
            while time.monotonic() < until:
                time.sleep(0.01)


def hang() -> None:
    """As a thread may wait for its GPU: it spins, and others of its process go on touching memory."""
    threading.Thread(target=_touch, daemon=True).start()
    while True:
        hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)


def _touch() -> None:
    touched = []
    while True:
        memory = mmap.mmap(-1, 16 * mmap.PAGESIZE, flags=mmap.MAP_PRIVATE)
        for page in range(0, len(memory), mmap.PAGESIZE):
            memory[page] = 1
        touched.append(memory)
        time.sleep(0.05)


def main() -> None:
    """As `batchrun.engine.rank`, with the faults."""
    seconds = float(os.environ.get(SILENT_SECONDS, rank_link.SILENT_SECONDS))
    rank_link.SILENT_SECONDS, rank_link.PULSE_SECONDS = seconds, 0.2  # type: ignore[assignment]
    preload = rank.preload

    def preload_faulty(kind: str) -> None:
        preload(kind)
        from batchrun.engine.paged.device.runner import Runner
        from batchrun.engine.paged.parallel import member

        faults, run, load_share, allocate = Faults(), Runner.run, member.load_share, member.allocate_pages

        def load_faulty(*args: Any) -> Any:
            faults.loading()
            return load_share(*args)

        def allocate_faulty(*args: Any) -> Any:
            faults.warming_up()
            return allocate(*args)

        def faulty(runner: Any, work: Any) -> Any:
            faults.before(work)
            return run(runner, work)

        member.load_share, member.allocate_pages = load_faulty, allocate_faulty
        Runner.run = faulty  # type: ignore[method-assign]

    rank.preload = preload_faulty
    rank.main()


if __name__ == "__main__":
    main()
