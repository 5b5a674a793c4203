"""Many Dask workers that share the memory of what they import: `forked_workers ADDRESS COUNT FOLDER`.

One process imports all that a worker needs and forks; each child is an ordinary worker, with engine and renderer of
its own. They end with the process, by a signal. Each writes when a task of its began and ended to FOLDER/<number>.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import gc
import os
import signal
import time
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
# Partitions at once on a worker.
SLOTS = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("count", type=int)
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()

    from batchrun.cluster.config import DASK_CONFIG
    from batchrun.model import light

    os.environ[light.VARIABLE] = "1"
    import dask

    dask.config.set(DASK_CONFIG)
    import s3fs  # noqa: F401

    import batchrun.worker.task  # noqa: F401
    from batchrun.model.light import import_tokenizers

    import_tokenizers()
    gc.collect()
    # What is there by now is written to by nobody, and so shared for good.
    gc.freeze()
    parent = os.getpid()
    for number in range(args.count):
        if os.fork() == 0:
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() == parent:
                asyncio.run(_work(args.address, number, args.folder))
            os._exit(0)
    signal.pause()


async def _work(address: str, number: int, folder: Path) -> None:
    from distributed import Worker, WorkerPlugin

    class Times(WorkerPlugin):
        """Notes when tasks begin and end."""

        def setup(self, worker: Any) -> None:
            self.file = (folder / str(number)).open("a", buffering=1)

        def transition(self, key: Any, start: str, finish: str, **more: Any) -> None:
            if str(key).startswith("batchrun-") and "executing" in (start, finish):
                self.file.write(f"{time.time()} {'begins' if finish == 'executing' else 'ends'}\n")

    async with Worker(
        address, nthreads=SLOTS, name=number, dashboard=False, plugins=[Times()], memory_limit=0
    ) as worker:
        await worker.finished()


if __name__ == "__main__":
    main()
