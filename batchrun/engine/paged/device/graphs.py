"""Decode steps captured as CUDA graphs, each for as long as the memory that it reads and writes is in place."""

from __future__ import annotations

import contextlib
import gc
import weakref
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.device.shapes import Shape


class Graph(Protocol):
    """A captured step."""

    def replay(self) -> None:
        """Runs the step again on what its buffers hold now; does not wait for it."""
        ...


class DecodeGraphs:
    """One graph for each shape of a decode step, all of them over the same memory.

    A graph holds addresses, not tensors: once the memory behind them is replaced, by whomever, replaying it would
    read and write what now belongs to somebody else. So every use names the memory, and graphs over another are
    dropped.
    """

    def __init__(self, device: torch.device) -> None:
        self._graphs: dict[Shape, Graph] = {}
        self._memory: weakref.ref[Tensor] | None = None
        self._device = device
        self._pool: Any = None
        # torch's own annotation of it is incomplete.
        new_stream: Any = torch.cuda.Stream
        self._stream: Any = new_stream(device) if devices.is_gpu(device) else None

    def find(self, shape: Shape, memory: Tensor) -> Graph | None:
        """The graph for this shape over `memory`, if there is one."""
        if self._memory is None or self._memory() is not memory:
            self.clear()
            self._memory = weakref.ref(memory)
        return self._graphs.get(shape)

    def capture(self, shape: Shape, step: Callable[[], None]) -> Graph:
        """Captures `step` for this shape, over the memory that `find` was last asked for.

        Raises:
            RuntimeError: among others torch.OutOfMemoryError; no graph is left then.
        """
        try:
            # Compiles what is not compiled yet, which a capture cannot.
            step()
            self._graphs[shape] = self._capture(step)
        except BaseException:
            self.clear()
            raise
        return self._graphs[shape]

    def clear(self) -> None:
        """Drops every graph, and the handle of their memory pool: torch takes none of a pool without graphs."""
        self._graphs.clear()
        self._pool = None

    def _capture(self, step: Callable[[], None]) -> Graph:
        """Not through `torch.cuda.graph`, which empties the allocator's cache each time."""
        here, graph = torch.cuda.current_stream(self._device), torch.cuda.CUDAGraph()
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream), _no_collections():
            graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
            try:
                step()
            except BaseException:
                # A capture left open would make every later call on this device fail.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(self._stream)
        self._pool = graph.pool()
        return graph


@contextlib.contextmanager
def _no_collections() -> Iterator[None]:
    """A collection may free what a CUDA graph or module holds, which ends a capture with an error."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
