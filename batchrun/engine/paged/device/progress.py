"""Whether a rank gets on with its work, however slow that is, or waits for something that may never come."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from batchrun.engine.processes.host_progress import HostProgress


class Progress(HostProgress):
    """Of a process, and of what the thread that makes it has put on its device: that comes past the marks that stand
    behind each layer and each decode step."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._on_gpu = device.type == "cuda"
        self._marks: deque[Any] = deque()

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
        """As `HostProgress.look`, or that the device came past a mark."""
        while self._marks and self._marks[0].query():
            self._marks.popleft()
            self._count += 1
        return super().look()
