"""What finished tasks gave back, which their workers keep, and may leave with."""

from __future__ import annotations

import threading
import time
from typing import Any

from distributed import Future

from batchrun.storage import deadline

# Seconds to wait for a finished task's receipt from its worker; for all of them together once the run is to stop.
RECEIPT_TIMEOUT, RECEIPTS_AT_STOP = 60.0, 2.0


class ReceiptReader:
    """Reads receipts until the run is to stop, and what it can for a moment afterwards."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._left = RECEIPTS_AT_STOP

    def read(self, future: Future) -> Any:
        """What the task gave back. Where its worker left with it Dask begins the task anew, and that is waited for.

        Raises:
            TimeoutError: it was waited for in vain.
            Exception: what the task, or its end, raised.
        """
        began = time.monotonic()
        try:
            # Not by several calls with timeouts of their own: Dask leaves an exception behind for each that runs out.
            return deadline.within(
                RECEIPT_TIMEOUT, lambda: future.result(timeout=RECEIPT_TIMEOUT), at_stop=self._left
            )
        finally:
            if self._stop.is_set():
                self._left = max(0.0, self._left - (time.monotonic() - began))
