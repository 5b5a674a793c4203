"""What an engine is at while it loads, for those who wait for it."""

from __future__ import annotations

from collections.abc import Callable

_listeners: list[Callable[[str], None]] = []


def listen(listener: Callable[[str], None]) -> None:
    """Has `listener` called with every stage that is entered, in the thread that loads the engine."""
    _listeners.append(listener)


def enter(stage: str) -> None:
    """Tells that loading has come to a stage, such as "compiling"."""
    for listener in _listeners:
        listener(stage)
