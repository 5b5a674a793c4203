"""The one attention room: a custom operator that models call, and the providers that compute it over pages."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from batchrun.engine.paged.architecture import Layer, attention_layers
from batchrun.engine.paged.batch import Batch, Provider
from batchrun.engine.paged.gathered import GatheredPages

IMPLEMENTATION = "batchrun_paged"
"""The name under which transformers finds the attention function."""

CASCADE_ROWS = 16
"""Rows from which the pages that all have in common are read once for all of them.

On an H200 a step of 1024 rows of 600 tokens (Qwen3-0.6B) takes 8.7 instead of 20.9 ms when 512 are common."""


class Cache:
    """The key/value pool's memory, and the model's attention layers bound to it."""

    def __init__(self, model: nn.Module, page_size: int, dtype: torch.dtype, device: torch.device) -> None:
        found = attention_layers(model)
        self.layers = [layer for _, layer in found]
        self.sinks = [getattr(module, "sinks", None) for module, _ in found]
        self.modules = [module for module, _ in found]
        self.page_size = page_size
        self.provider = choose(self.layers, dtype, device)
        self.cascades = self.provider.cascades and not any(layer.window for layer in self.layers)
        self._dtype, self._device = dtype, device
        for number, module in enumerate(self.modules):
            # A tensor, not a number: one compiled layer then serves all of them.
            module.batchrun_layer = torch.tensor(number)
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        self.allocate(1)

    @property
    def page_bytes(self) -> int:
        layer = self.layers[0]
        return len(self.layers) * 2 * self.page_size * layer.kv_heads * layer.head_dim * self._dtype.itemsize

    def allocate(self, pages: int) -> None:
        """Memory for `pages` pages; the content of the pages before is lost."""
        layer = self.layers[0]
        self.memory = torch.empty(0)
        shape = (len(self.layers), 2, pages, self.page_size, layer.kv_heads, layer.head_dim)
        self.memory = torch.zeros(shape, dtype=self._dtype, device=self._device)

    def copy(self, sources: Tensor, targets: Tensor, tokens: int) -> None:
        """The first `tokens` tokens of each source page, in all layers, to its target page."""
        if self.memory.is_cuda:
            from batchrun.engine.paged import kernels

            kernels.copy(self.memory.flatten(4).flatten(0, 1), sources, targets, tokens)
        else:
            self.memory[:, :, targets, :tokens] = self.memory[:, :, sources, :tokens]


@contextmanager
def using(cache: Cache, batch: Batch) -> Iterator[None]:
    """Model calls inside attend over `cache` as `batch` says."""
    global _current
    before, _current = _current, (cache, batch)
    try:
        yield
    finally:
        _current = before


_current: tuple[Cache, Batch] | None = None


@torch.library.custom_op("batchrun::paged_attention", mutates_args=())
def paged_attention(query: Tensor, key: Tensor, value: Tensor, layer: Tensor) -> Tensor:
    """Writes keys and values to the pool, then attends over it.

    The pool is reached through `using`, not through arguments: a compiled graph neither depends on its size nor
    copies it, and one graph serves every layer. query (1, heads, tokens, size) -> (1, tokens, heads, size).
    """
    assert _current is not None, "a paged model was called outside its engine"
    cache, batch = _current
    number = int(layer)
    keys, values = cache.memory[number, 0], cache.memory[number, 1]
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    attend = cache.provider.decode if batch.starts is None else cache.provider.prefill
    needs, sinks = cache.layers[number], cache.sinks[number]
    out = attend(query, _packed(key), _packed(value), keys, values, batch, needs, sinks)
    return out.contiguous()[None]


@paged_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, layer: Tensor) -> Tensor:
    batch, heads, tokens, size = query.shape
    return query.new_empty(batch, tokens, heads, size)


def _attention_function(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **needs: Any
) -> tuple[Tensor, None]:
    return paged_attention(query, key, value, module.batchrun_layer), None


AttentionInterface.register(IMPLEMENTATION, _attention_function)


def choose(layers: list[Layer], dtype: torch.dtype, device: torch.device) -> Provider:
    """The fastest provider that can do what all of the model's layers need."""
    half = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16)
    ampere = half and torch.cuda.get_device_capability(device) >= (8, 0)
    if ampere and layers[0].head_dim <= 256 and importlib.util.find_spec("triton"):
        from batchrun.engine.paged.flash import FlashAttention

        provider = FlashAttention()
        if provider.cascades or not any(layer.sinks for layer in layers):
            return provider
    return GatheredPages()


def _packed(x: Tensor) -> Tensor:
    """A token's heads side by side, as the kernels want them; a copy only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
