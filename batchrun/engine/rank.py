"""A further process of an engine over several GPUs: `python -m batchrun.engine.rank <socket> <parent's pid>`."""

from __future__ import annotations

import signal
import sys
from multiprocessing.connection import Connection

from batchrun.engine.choose import preload
from batchrun.engine.processes.launch import die_with_parent
from batchrun.engine.processes.rank_link import Link


def main() -> None:
    """Runs the rank that it is told over the socket to be, while the engine's process lives."""
    descriptor, parent = map(int, sys.argv[1:3])
    die_with_parent(parent)
    # As in the engine's process: whether to stop is the worker's decision.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link = Link(Connection(descriptor), parent)
    preload("paged")
    from batchrun.engine.paged.parallel.member import serve

    serve(link)


if __name__ == "__main__":
    main()
