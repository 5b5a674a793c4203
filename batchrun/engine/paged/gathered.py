"""Plain attention over a copy of each row's pages: any device, any dtype, and the reference for the kernels."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from batchrun.engine.paged.architecture import Layer
from batchrun.engine.paged.batch import Batch


class GatheredPages:
    """Plain attention over a copy of each row's pages: any device, any dtype, and the reference for the others."""

    name = "sdpa over gathered pages"
    cascades = False

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: Batch, layer: Layer,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        assert batch.starts is not None
        _write(key, value, keys, values, batch)
        out = torch.empty_like(query)
        starts, lengths = batch.starts.tolist(), batch.lengths.tolist()
        for row, length in enumerate(lengths):
            begin, end = starts[row], starts[row + 1]
            if end > begin:
                table = batch.tables[row, : -(-length // keys.shape[1])].long()
                own_keys, own_values = (x[table].flatten(0, 1)[:length] for x in (keys, values))
                places = torch.arange(length - (end - begin), length, device=query.device)
                out[begin:end] = _attend(
                    query[begin:end][None], own_keys[None], own_values[None], places[None], layer, sinks
                )[0]
        return out

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: Batch, layer: Layer,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        _write(key, value, keys, values, batch)
        tables = batch.tables.long()
        own_keys, own_values = (x[tables].flatten(1, 2) for x in (keys, values))
        places = (batch.lengths - 1).long()[:, None]
        # A row's last page keeps what earlier rows left behind its end, which need not be finite.
        behind = (torch.arange(own_keys.shape[1], device=query.device) > places)[:, :, None, None]
        own_keys, own_values = own_keys.masked_fill(behind, 0), own_values.masked_fill(behind, 0)
        return _attend(query[:, None], own_keys, own_values, places, layer, sinks)[:, 0]


def _write(key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: Batch) -> None:
    keys.flatten(0, 1).index_copy_(0, batch.places, key)
    values.flatten(0, 1).index_copy_(0, batch.places, value)


def _attend(
    query: Tensor, keys: Tensor, values: Tensor, places: Tensor, layer: Layer, sinks: Tensor | None
) -> Tensor:
    """query (rows, q, heads, size) at `places` (rows, q) over keys (rows, k, kv heads, size) at 0, 1, 2, ..."""
    behind = places[:, :, None] - torch.arange(keys.shape[1], device=query.device)
    seen = behind >= 0
    if layer.window is not None:
        seen &= behind < layer.window
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
