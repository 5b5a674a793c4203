"""In place of a rank: a process that says that it lives, and never gets on."""

import sys
import threading
from multiprocessing.connection import Connection

from batchrun.engine.processes import rank_link

if __name__ == "__main__":
    rank_link.PULSE_SECONDS = 0.1  # type: ignore[assignment]
    link = rank_link.Link(Connection(int(sys.argv[1])), int(sys.argv[2]))
    threading.Event().wait()
