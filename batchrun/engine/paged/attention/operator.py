"""Paged attention for models: a custom operator that they call, and the backends that compute it."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from batchrun.engine.layers.fp8 import FP8
from batchrun.engine.paged.attention import devices
from batchrun.engine.paged.attention.architecture import Layer, attention_layers
from batchrun.engine.paged.attention.cascade import CascadePlanner
from batchrun.engine.paged.attention.gathered import GatheredPages
from batchrun.engine.paged.attention.metadata import AttentionBackend, AttentionMetadata
from batchrun.engine.paged.attention.widened_pages import WIDENED_TOKENS

IMPLEMENTATION = "batchrun_paged"
"""The name under which transformers finds the attention function."""

SCALE = torch.float32
"""What the scales of keys and values in fp8 are in."""


class KVCache:
    """The key/value pool's memory, and the model's attention layers bound to it.

    `memory` (layers, 2, pages, page size, kv heads, head size) is in the model's `dtype`, or in fp8; then `scales`
    (layers, 2, pages, kv heads, page size) float32 has one for each token's keys and values of a head.
    """

    def __init__(
        self, model: nn.Module, page_size: int, dtype: torch.dtype, device: torch.device, fp8: bool = False
    ) -> None:
        found = attention_layers(model)
        self.layers = [layer for _, layer in found]
        self.sinks = [getattr(module, "sinks", None) for module, _ in found]
        self.modules = [module for module, _ in found]
        self.page_size = page_size
        self.backend = choose_backend(self.layers, dtype, device)
        self._model_dtype, self._dtype, self._device = dtype, FP8 if fp8 else dtype, device
        for number, module in enumerate(self.modules):
            # A tensor, not a number: one compiled layer then serves all of them.
            module.batchrun_layer = torch.tensor(number)
        model.set_attn_implementation(IMPLEMENTATION)  # type: ignore[operator]
        self.allocate(1)

    def cascade_planner(self, *, prefills: bool) -> CascadePlanner | None:
        """Where attention of prefills, or of decode steps, can read what several sequences begin with once for all of
        them."""
        # What is in a window of one sequence is not in that of another. Blocks have to do for all layers.
        layer = max(self.layers, key=lambda layer: layer.query_heads)
        queries = self.backend.cascade_queries(layer)
        if queries is None or any(other.window for other in self.layers):
            return None
        if self._dtype == FP8 and not (prefills and self.widens_pages):
            # Large blocks have too many numbers to convert at once. On an H200, 8 key heads and 32 query heads, 40
            # groups of 25 rows with 4,000 tokens: 640 us a step in small ones, 1,030 in large ones, 460 in bfloat16.
            queries = queries[0], queries[0]
        return CascadePlanner(layer, queries, self._dtype.itemsize)

    @property
    def name(self) -> str:
        """How attention is computed, and over what if that is not the model's format."""
        return self.backend.name + (", keys and values in fp8" if self._dtype == FP8 else "")

    @property
    def widens_pages(self) -> bool:
        """Whether a prefill brings pages back to the model's format before it attends over them."""
        return self._dtype == FP8 and self.backend.widens_pages

    def widened_bytes(self, max_context: int) -> int:
        """Of what a prefill brings back at once, with sequences of `max_context` tokens."""
        if not self.widens_pages:
            return 0
        layer, tokens = self.layers[0], max(WIDENED_TOKENS, max_context)
        pages = -(-tokens // self.page_size) + 1
        return 2 * pages * self.page_size * layer.kv_heads * layer.head_dim * self._model_dtype.itemsize

    @property
    def page_bytes(self) -> int:
        """Bytes of one page in all layers, keys and values together."""
        layer = self.layers[0]
        head_bytes = layer.head_dim * self._dtype.itemsize + (SCALE.itemsize if self._dtype == FP8 else 0)
        return len(self.layers) * 2 * self.page_size * layer.kv_heads * head_bytes

    def allocate(self, pages: int) -> None:
        """Memory for `pages` pages; the content of the pages before is lost."""
        kv_heads, head_dim = self.layers[0].kv_heads, self.layers[0].head_dim
        planes = (len(self.layers), 2, pages)
        self.memory, self.scales = torch.empty(0), None
        self.memory = torch.zeros(
            *planes, self.page_size, kv_heads, head_dim, dtype=self._dtype, device=self._device
        )
        if self._dtype == FP8:
            self.scales = torch.zeros(*planes, kv_heads, self.page_size, dtype=SCALE, device=self._device)

    def of_layer(self, number: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """A layer's keys and values, and their scales if they are in fp8."""
        return (
            self.memory[number, 0],
            self.memory[number, 1],
            None if self.scales is None else self.scales[number],
        )

    def copy_pages(self, sources: Tensor, targets: Tensor, tokens: Tensor) -> None:
        """The first so many `tokens` of each source page, in all layers, to its target page: (copies,) int64 each.
        Scales are copied of all tokens: those behind are written before they are read."""
        # Bytes, where nothing but ours computes with what they stand for.
        memory = self.memory.view(torch.uint8) if self._dtype == FP8 else self.memory
        if devices.is_gpu(self.memory.device):
            from batchrun.engine.paged.attention import page_kernels

            page_kernels.copy_pages(memory.flatten(4).flatten(0, 1), sources, targets, tokens)
            if self.scales is not None:
                pages = self.scales.flatten(3).flatten(0, 1)[:, :, None]
                page_kernels.copy_pages(pages, sources, targets, torch.ones_like(tokens))
        else:
            most = int(tokens.max())
            memory[:, :, targets, :most] = memory[:, :, sources, :most]
            if self.scales is not None:
                self.scales[:, :, targets] = self.scales[:, :, sources]


@contextmanager
def forward_context(cache: KVCache, metadata: AttentionMetadata) -> Iterator[None]:
    """Model calls inside attend over `cache` as `metadata` says."""
    global _current
    before, _current = _current, (cache, metadata)
    try:
        yield
    finally:
        _current = before


_current: tuple[KVCache, AttentionMetadata] | None = None


@torch.library.custom_op("batchrun::paged_attention", mutates_args=())
def paged_attention(query: Tensor, key: Tensor, value: Tensor, layer: Tensor) -> Tensor:
    """Writes keys and values to the pool, then attends over it.

    The pool is reached through `forward_context`, not through arguments: a compiled graph neither depends on its size
    nor copies it, and one graph serves every layer. query (1, heads, tokens, size) -> (1, tokens, heads, size).
    """
    assert _current is not None, "a paged model was called outside its engine"
    cache, metadata = _current
    number = int(layer)
    key_cache, value_cache, scales = cache.of_layer(number)
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    attend = cache.backend.decode if metadata.cu_seqlens_q is None else cache.backend.prefill
    needs, sinks = cache.layers[number], cache.sinks[number]
    out = attend(
        query,
        _with_packed_heads(key),
        _with_packed_heads(value),
        key_cache,
        value_cache,
        metadata,
        needs,
        sinks,
        scales,
    )
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


def choose_backend(layers: list[Layer], dtype: torch.dtype, device: torch.device) -> AttentionBackend:
    """The fastest backend that can do what all of the model's layers need."""
    half = devices.is_gpu(device) and dtype in (torch.bfloat16, torch.float16)
    ampere = half and torch.cuda.get_device_capability(device) >= (8, 0)
    if ampere and layers[0].head_dim <= 256 and importlib.util.find_spec("triton"):
        from batchrun.engine.paged.attention.flash import FlashAttention

        return FlashAttention()
    return GatheredPages()


def _with_packed_heads(x: Tensor) -> Tensor:
    """A token's heads side by side, as the kernels want them; a copy only if they are not."""
    return x if x.stride(2) == 1 and x.stride(1) == x.shape[2] else x.contiguous()
