"""A rank's connection to rank 0, in threads of its own: it is open before the process imports torch."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

from batchrun.engine.processes.host_progress import HostProgress
from batchrun.engine.processes.rank_messages import PULSE_SECONDS, SILENT_SECONDS, Pulse


class Link:
    """One thread receives, so that rank 0 need not wait for this process, and one shows that it is alive.

    `inbox` has what rank 0 tells, `progress` says how far this rank has come, see `Pulse`: until something better is
    set, how far the thread has that makes this.
    """

    def __init__(self, connection: Connection, parent: int) -> None:
        self.inbox: SimpleQueue[Any] = SimpleQueue()
        self.progress: Callable[[], int] = HostProgress().look
        self._connection, self._parent = connection, parent
        self._sending = threading.Lock()
        self._silent = 0
        threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._pulse, daemon=True).start()

    def send(self, message: Any) -> None:
        """One caller at a time; the process ends where nobody listens."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def _receive(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self._silent = 0
                if not isinstance(message, Pulse):
                    self.inbox.put(message)
        except (EOFError, OSError):
            os._exit(0)

    def _pulse(self) -> None:
        # Counted, not measured: while this process itself is paused, rank 0's silence is not.
        while self._silent <= SILENT_SECONDS:
            self.send(Pulse(self.progress()))
            time.sleep(PULSE_SECONDS)
            self._silent += PULSE_SECONDS
        # It has stopped, so that nobody else would end it.
        print(f"RankError: rank 0 has said nothing for {SILENT_SECONDS} s", file=sys.stderr, flush=True)
        with suppress(ProcessLookupError):
            os.kill(self._parent, signal.SIGKILL)
        os._exit(1)
