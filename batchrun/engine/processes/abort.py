"""An engine that ends its process while the thread that runs it waits for something that will not come."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import NoReturn

from batchrun.errors import EngineError

_listeners: list[Callable[[EngineError], None]] = []


def listen(listener: Callable[[EngineError], None]) -> None:
    """Has `listener` called with the error before the process ends, in whichever thread that is."""
    _listeners.append(listener)


def abort(error: EngineError) -> NoReturn:
    """Ends the process with the error, which is told to the listeners and is the last line that it prints."""
    for listener in _listeners:
        listener(error)
    print(f"EngineError: {error}", file=sys.stderr, flush=True)
    os._exit(1)
