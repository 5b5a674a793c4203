"""FlashAttention-2 over pages (Dao, 2023), by the flash-attn package."""

from __future__ import annotations

import torch
from flash_attn import flash_attn_varlen_func, flash_attn_with_kvcache
from torch import Tensor

from batchrun.engine.paged import kernels
from batchrun.engine.paged.architecture import Layer
from batchrun.engine.paged.attention import Batch


class FlashAttention:
    name = "flash-attn 2"
    cascades = True
    own_decode = True

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor, batch: Batch, layer: Layer,
        sinks: Tensor | None,
    ) -> Tensor:  # fmt: skip
        if batch.fresh:  # a tenth faster than through the pages
            keys, values = key, value
        out, lse, _ = flash_attn_varlen_func(
            query, keys, values, batch.starts, batch.starts if batch.fresh else batch.ends,
            batch.longest_query, batch.longest_query if batch.fresh else batch.longest,
            block_table=None if batch.fresh else batch.tables, return_attn_probs=True, **_options(layer),
        )  # fmt: skip
        return out if sinks is None else _with_sinks(out, lse.t(), sinks)

    def decode(
        self, query: Tensor, keys: Tensor, values: Tensor, batch: Batch, layer: Layer, sinks: Tensor | None
    ) -> Tensor:
        options = _options(layer)
        splits = _splits(batch, layer, keys)
        if splits == 1 and self.own_decode:
            out, lse = kernels.decode(query, keys, values, batch.tables, batch.lengths, layer)
        else:
            out, lse = flash_attn_with_kvcache(
                query[:, None], keys, values, cache_seqlens=batch.lengths, block_table=batch.tables,
                num_splits=splits, return_softmax_lse=True, **options,
            )  # fmt: skip
            out, lse = out[:, 0], lse[:, :, 0]
        if batch.trunk is not None:
            # All rows' queries are one long query over the common pages: those are read once, not once per row.
            trunk, trunk_lse, _ = flash_attn_varlen_func(
                query, keys, values, batch.trunk.starts, batch.trunk.ends,
                len(query), batch.trunk.table.shape[1] * keys.shape[1],
                block_table=batch.trunk.table, return_attn_probs=True, **{**options, "causal": False},
            )  # fmt: skip
            return kernels.join(trunk, trunk_lse, out.contiguous(), lse.contiguous())
        return out if sinks is None else _with_sinks(out, lse, sinks)


def _options(layer: Layer) -> dict[str, object]:
    return {
        "softmax_scale": layer.scale,
        "causal": True,
        "window_size": (-1, -1) if layer.window is None else (layer.window - 1, 0),
        "softcap": layer.softcap or 0.0,
    }


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """A sink takes its share of the probability: out (tokens, heads, size), lse (tokens, heads)."""
    return (out * torch.sigmoid(lse - sinks.float())[..., None]).to(out.dtype)


def _splits(batch: Batch, layer: Layer, keys: Tensor) -> int:
    """Blocks that share one row's keys: few rows alone would leave most of the GPU idle."""
    blocks = len(batch.lengths) * layer.kv_heads
    wanted = 4 * torch.cuda.get_device_properties(keys.device).multi_processor_count
    return max(1, min(wanted // blocks, batch.tables.shape[1] * keys.shape[1] // 128))
