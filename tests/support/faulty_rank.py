"""A rank of an engine that fails as a real one may, while the others go on; `FAULTS` says how."""

from __future__ import annotations

import mmap
import os
import threading
import time
from typing import Any

from batchrun.engine import rank
from batchrun.engine.processes import rank_link

SILENT_SECONDS = "BATCHRUN_TEST_SILENT_SECONDS"
"""After which a rank and rank 0 give each other up."""
FAULTS = "BATCHRUN_TEST_RANK_FAULTS"
"""Words, each with a number: "rows 2" are the most that there is memory for to decode, "slow 3" the seconds that a
prompt takes that begins with SLOW, "read 3" those that a store takes to give the weights."""
SLOW, STUCK = 257, 258
"""Tokens. The rank never takes part in the batch of a prompt that begins with STUCK."""


class Faults:
    """What may happen while it loads, and before a batch."""

    def __init__(self) -> None:
        words = os.environ.get(FAULTS, "").split()
        self.numbers = dict(zip(words[::2], map(float, words[1::2]), strict=True))

    def loading(self) -> None:
        # As transformers has it: threads of its own read, and the one that loads waits for them.
        reader = threading.Thread(target=self._read)
        reader.start()
        reader.join()

    def _read(self) -> None:
        pages = range(int(self.numbers.get("read", 0) / 0.05))
        with mmap.mmap(-1, (1 + len(pages)) * mmap.PAGESIZE) as memory:
            memory.madvise(mmap.MADV_NOHUGEPAGE)
            for page in pages:
                memory[page * mmap.PAGESIZE] = 1
                time.sleep(0.05)

    def before(self, work: Any) -> None:
        import torch

        from batchrun.engine.paged.device.work import DecodeWork

        if isinstance(work, DecodeWork):
            if len(work.slots) > self.numbers.get("rows", len(work.slots)):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB")
            return
        if STUCK in work.tokens[work.positions == 0]:
            threading.Event().wait()
        if SLOW in work.tokens[work.positions == 0]:
            until = time.monotonic() + self.numbers["slow"]
            while time.monotonic() < until:
                time.sleep(0.01)


def main() -> None:
    """As `batchrun.engine.rank`, with the faults."""
    seconds = float(os.environ.get(SILENT_SECONDS, rank_link.SILENT_SECONDS))
    rank_link.SILENT_SECONDS, rank_link.PULSE_SECONDS = seconds, 0.2  # type: ignore[assignment]
    preload = rank.preload

    def preload_faulty(kind: str) -> None:
        preload(kind)
        from batchrun.engine.paged.device.runner import Runner
        from batchrun.engine.paged.parallel import member

        faults, run, load_share = Faults(), Runner.run, member.load_share

        def load_faulty(*args: Any) -> Any:
            faults.loading()
            return load_share(*args)

        def faulty(runner: Any, work: Any) -> Any:
            faults.before(work)
            return run(runner, work)

        member.load_share = load_faulty
        Runner.run = faulty  # type: ignore[method-assign]

    rank.preload = preload_faulty
    rank.main()


if __name__ == "__main__":
    main()
