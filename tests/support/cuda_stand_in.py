"""torch.cuda as far as the paged engine calls them, on a CPU: names, arguments and results, no speed."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.device.graphs import DecodeGraphs


class Event:
    """Of a stream that has done its work whenever it is asked."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self._recorded = 0.0

    def record(self) -> None:
        self._recorded = time.perf_counter()

    def query(self) -> bool:
        return bool(self._recorded)

    def synchronize(self) -> None:
        assert self._recorded, "waits for an event that was never recorded"

    def elapsed_time(self, end: Event) -> float:
        return 1000 * (end._recorded - self._recorded)


class Stream:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)


class Graph:
    """Replays by running the captured step again. `captured` counts them all."""

    captured = 0

    def __init__(self) -> None:
        self.step: Callable[[], None] | None = None
        self._open = False

    def capture_begin(self, pool: object, capture_error_mode: str) -> None:
        assert capture_error_mode in ("global", "thread_local", "relaxed")
        self._open = True

    def capture_end(self) -> None:
        assert self._open
        self._open = False
        Graph.captured += 1

    def pool(self) -> tuple[int, int]:
        return 0, 1

    def replay(self) -> None:
        assert self.step is not None
        assert not self._open
        self.step()


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the paged engine takes a CPU for a GPU; Triton's kernels are interpreted."""
    monkeypatch.setattr(devices, "is_gpu", lambda device: True)
    Graph.captured = 0
    capture, empty = DecodeGraphs._capture, torch.empty

    def captured(self: DecodeGraphs, step: Callable[[], None]) -> Any:
        graph: Any = capture(self, step)
        graph.step = step
        return graph

    @contextlib.contextmanager
    def stream(stream: Stream) -> Iterator[None]:
        yield

    def unpinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        return empty(*shape, **options)

    monkeypatch.setattr(DecodeGraphs, "_capture", captured)
    monkeypatch.setattr(torch, "empty", unpinned)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "compile", lambda function, fullgraph: function)
    replaced: dict[str, Any] = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "stream": stream,
        "current_stream": Stream,
        "empty_cache": lambda: None,
        "reset_peak_memory_stats": lambda device: None,
        "mem_get_info": lambda device: (6 << 30, 8 << 30),
        "memory_reserved": lambda device: 1 << 30,
        "max_memory_reserved": lambda device: 2 << 30,
        "get_device_name": lambda device: "a GPU",
        "get_device_capability": lambda device: (9, 0),
    }
    for name, value in replaced.items():
        # What torch does not have, an engine could not call on a GPU either.
        assert hasattr(torch.cuda, name)
        monkeypatch.setattr(torch.cuda, name, value)
