"""What finished tasks gave back, which their workers keep, and may leave with."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from distributed import Future

from batchrun.storage import deadline

T = TypeVar("T")

# Seconds to wait for a finished task's receipt from its worker; for all of them together once the run is to stop.
RECEIPT_TIMEOUT, RECEIPTS_AT_STOP = 60.0, 0.5
# Seconds for those of many tasks at once: of one whose worker has just left, the others need not wait longer.
FETCH_TIMEOUT = 5.0
# What Dask calls a task that was finished, once its worker has left.
LEFT = ("lost", "pending")


class ReceiptReader:
    """Reads receipts until the run is to stop, and what it can for a moment afterwards."""

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop
        self._left = RECEIPTS_AT_STOP
        self._fetched: dict[str, Any] = {}

    def read(self, future: Future, others: Iterable[Future] = ()) -> Any:
        """What the task gave back. Where its worker left with it Dask begins the task anew, and that is waited for.

        What `others` that are finished gave back comes along, and is kept for their turn: each round trip takes
        milliseconds, in which the next tasks end.

        Raises:
            TimeoutError: it was waited for in vain.
            Exception: what the task, or its end, raised.
        """
        if self._stop.is_set() and future.status in LEFT:
            raise TimeoutError("the task's worker left with its receipt")
        if future.key not in self._fetched:
            self._fetched = self._fetch([future, *others])
        if future.key in self._fetched:
            return self._fetched.pop(future.key)
        return self._within(RECEIPT_TIMEOUT, lambda: future.result(timeout=RECEIPT_TIMEOUT))

    def _fetch(self, futures: Sequence[Future]) -> dict[str, Any]:
        """By key what those of them that are finished gave back; nothing where anything goes wrong."""
        finished = [future for future in futures if future.status == "finished"]
        if len(finished) < 2:
            return {}
        try:
            receipts = self._within(FETCH_TIMEOUT, lambda: finished[0].client.gather(finished))
        except Exception:
            # Each tells by itself when it is read.
            return {}
        return dict(zip((future.key for future in finished), receipts, strict=True))

    def _within(self, seconds: float, call: Callable[[], T]) -> T:
        began = time.monotonic()
        try:
            # Not by several calls with timeouts of their own: Dask leaves an exception behind for each that runs out.
            return deadline.within(seconds, call, at_stop=self._left)
        finally:
            if self._stop.is_set():
                self._left = max(0.0, self._left - (time.monotonic() - began))
