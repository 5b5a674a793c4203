"""Whether a rank gets on with its work, however slow that is, or waits for something that may never come."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import cycle

import torch
from torch import Tensor, nn

from batchrun.engine.processes.host_progress import HostProgress

_MARKS = 256


class Progress(HostProgress):
    """Of a process, and of what the thread that makes it has put on its device: that comes past the marks that stand
    behind each layer and each decode step.

    A mark is the device's own writing to host memory. To ask the driver whether an event has happened would not do: it
    answers nobody while it loads a kernel, for which it may wait until all that runs has ended, and an event is asked
    with Python's lock held, so that the process would stand still with what it is to watch.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self._device = device
        self._passed: Tensor | None = None
        self._before = 0

    def mark_layers(self, layers: Iterable[nn.Module]) -> None:
        """Marks the end of each layer, whenever it runs. Once, and before `mark`."""
        # A CPU computes while the thread waits.
        if self._device.type != "cuda":
            return
        self._marks = cycle(torch.arange(_MARKS, dtype=torch.int32, device=self._device).unbind())
        self._passed = torch.zeros((), dtype=torch.int32, pin_memory=True)
        for layer in layers:
            layer.register_forward_hook(lambda *_: self.mark())

    def mark(self) -> None:
        """The device has come so far once it comes past all that was launched before."""
        # What is captured now runs later, when its graph is.
        if self._passed is not None and not torch.cuda.is_current_stream_capturing():
            self._passed.copy_(next(self._marks), non_blocking=True)

    def look(self) -> int:
        """As `HostProgress.look`, or that the device came past a mark."""
        if self._passed is not None:
            passed = int(self._passed)
            self._count += passed != self._before
            self._before = passed
        return super().look()
