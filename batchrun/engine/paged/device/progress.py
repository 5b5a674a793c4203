"""Whether a rank gets on with its work, however slow that is, or waits for something that may never come."""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


class Progress:
    """Of the thread that made it, and of what that thread has put on its device.

    A thread that waits for another rank, or for its device, stays at one place of its Python code; one that traces,
    compiles or launches does not. A device comes past the marks that stand behind each layer and each decode step.
    """

    def __init__(self, device: torch.device) -> None:
        self._thread = threading.get_ident()
        self._on_gpu = device.type == "cuda"
        self._marks: deque[Any] = deque()
        self._place: tuple[int, int] | None = None
        self._count = 0

    def mark(self) -> None:
        """The device has come so far once it comes past all that was launched before. A CPU computes while the thread
        waits; and what is captured now runs later, when its graph is."""
        if self._on_gpu and not torch.cuda.is_current_stream_capturing():
            # torch's own annotation of it is incomplete.
            new_event: Any = torch.cuda.Event
            event = new_event()
            event.record()
            self._marks.append(event)

    def mark_layers(self, layers: Iterable[nn.Module]) -> None:
        """Marks the end of each layer, whenever it runs."""
        for layer in layers:
            layer.register_forward_hook(lambda *_: self.mark())

    def look(self) -> int:
        """A number that has grown if anything got on since the last look. In another thread, always the same one."""
        frame = sys._current_frames().get(self._thread)
        place = frame and (id(frame), frame.f_lasti)
        went_on = place != self._place
        self._place = place
        while self._marks and self._marks[0].query():
            self._marks.popleft()
            went_on = True
        self._count += went_on
        return self._count
