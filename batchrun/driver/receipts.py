"""What a finished task gave back, which its worker keeps and may leave with."""

from __future__ import annotations

import threading
import time
from typing import Any

from distributed import Future

# Seconds to wait for a finished task's receipt from its worker.
RECEIPT_TIMEOUT = 60.0
# Seconds between two looks at whether to stop.
LOOK = 0.5


def wait_for_receipt(future: Future, stop: threading.Event) -> Any:
    """The task's receipt, or receipts. Where its worker left with them Dask begins the task anew, and that is waited
    for, but not beyond a stop.

    Raises:
        TimeoutError: it was waited for in vain.
        Exception: whatever the task, or its end, raised.
    """
    deadline = time.monotonic() + RECEIPT_TIMEOUT
    while True:
        try:
            return future.result(timeout=LOOK)
        except TimeoutError:
            if stop.is_set() or time.monotonic() > deadline:
                raise
