"""Plain attention over a copy of each sequence's pages: any device, any dtype, and the reference for the kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from batchrun.engine.layers.fp8 import FP8, quantize_rows
from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.metadata import AttentionMetadata


class GatheredPages:
    """Plain attention over a copy of each sequence's pages, on any device and for any dtype."""

    name = "sdpa over gathered pages"
    widens_pages = False
    notes: Sequence[str] = ()

    def cascade_queries(self, layer: Layer) -> tuple[int, int] | None:
        """See `AttentionBackend`."""
        return None

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend`: one sequence after another."""
        assert metadata.cu_seqlens_q is not None
        _write(key, value, key_cache, value_cache, scales, metadata)
        out = torch.empty_like(query)
        cu_seqlens_q, seq_lens = metadata.cu_seqlens_q.tolist(), metadata.seq_lens.tolist()
        for row, seq_len in enumerate(seq_lens):
            begin, end = cu_seqlens_q[row], cu_seqlens_q[row + 1]
            if end > begin:
                block_table = metadata.block_tables[row, : -(-seq_len // key_cache.shape[1])].long()
                own_keys, own_values = (
                    pages.flatten(0, 1)[:seq_len]
                    for pages in _read(key_cache, value_cache, scales, block_table, query.dtype)
                )
                positions = torch.arange(seq_len - (end - begin), seq_len, device=query.device)
                out[begin:end] = _attend(
                    query[begin:end][None], own_keys[None], own_values[None], positions[None], layer, sinks
                )[0]
        return out

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend`: all sequences at once, as long as the longest block table."""
        _write(key, value, key_cache, value_cache, scales, metadata)
        block_tables = metadata.block_tables.long()
        own_keys, own_values = (
            pages.flatten(1, 2) for pages in _read(key_cache, value_cache, scales, block_tables, query.dtype)
        )
        positions = (metadata.seq_lens - 1).long()[:, None]
        # A sequence's last page keeps what earlier sequences left behind its end, which need not be finite.
        behind = (torch.arange(own_keys.shape[1], device=query.device) > positions)[:, :, None, None]
        own_keys, own_values = own_keys.masked_fill(behind, 0), own_values.masked_fill(behind, 0)
        return _attend(query[:, None], own_keys, own_values, positions, layer, sinks)[:, 0]


def _write(
    key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor, scales: Tensor | None,
    metadata: AttentionMetadata,
) -> None:  # fmt: skip
    page_size = key_cache.shape[1]
    page, offset = metadata.slot_mapping // page_size, metadata.slot_mapping % page_size
    for number, (new, cache) in enumerate(((key, key_cache), (value, value_cache))):
        if scales is None:
            cache[page, offset] = new
        else:
            rows, scale = quantize_rows(new.flatten(0, 1))
            # torch moves bytes about, whatever they stand for.
            cache.view(torch.uint8)[page, offset] = rows.view(torch.uint8).view_as(new)
            scales[number, page, :, offset] = scale.view(new.shape[:2])


def _read(
    key_cache: Tensor, value_cache: Tensor, scales: Tensor | None, pages: Tensor, dtype: torch.dtype
) -> list[Tensor]:
    """The pages' keys and values, each (*pages, page size, kv heads, head size), in `dtype` where they are in fp8."""
    if scales is None:
        return [key_cache[pages], value_cache[pages]]
    return [
        (cache.view(torch.uint8)[pages].view(FP8).float() * own[pages].transpose(-1, -2)[..., None]).to(dtype)
        for cache, own in zip((key_cache, value_cache), scales, strict=True)
    ]


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, positions: Tensor, layer: Layer, sinks: Tensor | None
) -> Tensor:
    """query (batch, q, heads, size) at `positions` (batch, q) over keys (batch, k, kv heads, size) at 0, 1, 2, ..."""
    distance = positions[:, :, None] - torch.arange(keys.shape[1], device=query.device)
    seen = distance >= 0
    if layer.window is not None:
        seen &= distance < layer.window
    query, keys, values = (x.transpose(1, 2) for x in (query, keys, values))
    seen = seen[:, None]
    if layer.softcap is None and sinks is None:
        out = functional.scaled_dot_product_attention(
            query, keys, values, attn_mask=seen, scale=layer.scale, enable_gqa=True
        )
        return out.transpose(1, 2)
    group = query.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(group, dim=1) for x in (keys, values))
    scores = (query @ keys.transpose(2, 3)).float() * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        column = sinks.float()[None, :, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, column], dim=-1)
    weights = scores.softmax(dim=-1)[..., : keys.shape[2]].to(query.dtype)
    return (weights @ values).transpose(1, 2)
