"""How much the engine may hold: its budgets, and the pages that are left for keys and values."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self

import torch

from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.attention.operator import KVCache

SMALL_MODEL = 1_000_000_000
"""Parameters."""


@dataclass(frozen=True, slots=True)
class Budget:
    """The paged engine's part of the job's engine settings, filled in for a device.

    `max_rows` sequences decode at once, `prefill_tokens` are computed in one batch, `decode_steps` run between two
    looks at the host, `memory_fraction` of the device's memory is used in all.
    """

    max_rows: int
    prefill_tokens: int
    decode_steps: int
    memory_fraction: float
    cache_tokens: int | None
    window_rows: int
    compile: bool

    @classmethod
    def of(cls, options: dict[str, object], device: torch.device, parameters: int = 0) -> Self:
        """What the job's engine settings say; what they leave out follows from the device and the model's size."""
        gpu = devices.is_gpu(device)
        given: dict[str, Any] = {name: value for name, value in options.items() if value is not None}
        return cls(
            max_rows=given.get("max_rows", 2048 if gpu else 64),
            prefill_tokens=given.get("prefill_tokens", _prefill_tokens(parameters) if gpu else 2048),
            decode_steps=given.get("decode_steps", 8),
            memory_fraction=given.get("memory_fraction", 0.9),
            cache_tokens=given.get("cache_tokens"),
            window_rows=given.get("window_rows", 8192),
            compile=gpu and given.get("compile", True),
        )


def _prefill_tokens(parameters: int) -> int:
    """Enough to keep a GPU busy for longer than the host takes for a batch: on an H100 machine 55 ms for a model of 28
    layers, and 38 ms on the GPU for 16384 tokens of Qwen3-0.6B."""
    return 32768 if parameters < SMALL_MODEL else 16384


def affordable_pages(
    cache: KVCache, budget: Budget, max_context: int, device: torch.device, warm_up: Callable[[], None]
) -> int:
    """Pages for the pool, the null page included: what is free once `warm_up` has run the largest shapes.

    On a CPU as many as `max_rows` of the longest sequences can need, in at most a quarter of the machine's memory.
    """
    if devices.is_gpu(device):
        # What came before, the weights' loading or another engine of this process, is no measure of this one's work.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        warm_up()
        free, total = torch.cuda.mem_get_info(device)
        reserved = torch.cuda.memory_reserved(device)
        others = total - free - reserved
        peak = max(reserved, torch.cuda.max_memory_reserved(device))
        own = budget.memory_fraction * total - others - peak - cache.widened_bytes(max_context)
        most = int(own) // cache.page_bytes
        # The warm-up's memory, which the pool takes in part and captured steps in part, is nobody's until then.
        torch.cuda.empty_cache()
    else:
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        most = min(machine // 4 // cache.page_bytes, 1 + budget.max_rows * -(-max_context // cache.page_size))
    if budget.cache_tokens is not None:
        most = min(most, 1 + budget.cache_tokens // cache.page_size)
    return max(most, 2)
