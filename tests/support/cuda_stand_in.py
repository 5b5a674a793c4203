"""torch.cuda and flash-attn as far as the paged engine calls them, on a CPU: names, arguments and results, no speed."""

from __future__ import annotations

import contextlib
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from batchrun.engine.paged import devices
from batchrun.engine.paged.graphs import DecodeGraphs


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


def varlen_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor,
    max_seqlen_q: int, max_seqlen_k: int, softmax_scale: float, causal: bool, window_size: tuple[int, int],
    softcap: float, return_attn_probs: bool, block_table: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, None]:  # fmt: skip
    """flash-attn's `flash_attn_varlen_func` over pages, in plain torch."""
    assert return_attn_probs
    out, lse = torch.empty_like(q), torch.empty(q.shape[1], len(q))
    for number in range(len(cu_seqlens_q) - 1):
        begin, end = cu_seqlens_q[number : number + 2].tolist()
        keys_begin, keys_end = cu_seqlens_k[number : number + 2].tolist()
        length = keys_end - keys_begin
        assert end - begin <= max_seqlen_q
        assert length <= max_seqlen_k
        table = block_table[number].long()
        group = q.shape[1] // k.shape[2]
        keys, values = (x[table].flatten(0, 1)[:length].repeat_interleave(group, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q[begin:end], keys).float() * softmax_scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        if causal:
            behind = torch.arange(length - (end - begin), length)[:, None] - torch.arange(length)
            seen = behind >= 0
            if window_size[0] >= 0:
                seen &= behind <= window_size[0]
            scores = scores.masked_fill(~seen, float("-inf"))
        out[begin:end] = torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(values.dtype), values)
        lse[:, begin:end] = scores.logsumexp(-1)
    return out, lse, None


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the paged engine takes a CPU for a GPU with flash-attn; Triton's kernels are interpreted."""
    flash_attn: Any = types.ModuleType("flash_attn")
    flash_attn.__spec__ = types.SimpleNamespace(name="flash_attn")
    flash_attn.flash_attn_varlen_func = varlen_attention
    monkeypatch.setitem(sys.modules, "flash_attn", flash_attn)
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
