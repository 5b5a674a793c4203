"""FlashAttention over pages on a GPU: Triton kernels of our own, and flash-attn 2 (Dao, 2023) where it is better.

Measured on an H200 in bf16, microseconds, ours against flash-attn 2.8.3: decode of 1024 sequences of 20 to 1500
tokens 271 : 369 (4.4 : 3.2 TB/s); of 300 sequences of 20 to 3300 tokens 261 : 322; prefill, 32 query heads, of 27
prompts of 600 tokens 327 : 444, of 109 of 150 tokens 216 : 393, of 5 of 3000 tokens 943 : 1200.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from batchrun.engine.paged import decode_attention, fp8_pages, kernels, prefill_attention
from batchrun.engine.paged.architecture import Layer
from batchrun.engine.paged.metadata import AttentionMetadata


class FlashAttention:
    """flash-attn, if installed, reads a shared prefix once; it reads no pages in fp8."""

    def __init__(self) -> None:
        self.supports_cascade = importlib.util.find_spec("flash_attn") is not None
        self.name = "triton and flash-attn 2" if self.supports_cascade else "triton"

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend`: over the call's own keys where there are no older ones, else through the pages."""
        assert metadata.cu_seqlens_q is not None
        if scales is None:
            kernels.write_kv_cache(key, value, key_cache, value_cache, metadata.slot_mapping)
        else:
            # They are seen as later tokens will see them.
            key, value = fp8_pages.write_quantized(
                key, value, key_cache, value_cache, scales, metadata.slot_mapping
            )
        # Sequences without older tokens need no detour through the pages.
        keys, values, block_tables, scales = (
            (key, value, None, None)
            if metadata.no_context
            else (key_cache, value_cache, metadata.block_tables, scales)
        )
        return prefill_attention.prefill(
            query,
            keys,
            values,
            block_tables,
            metadata.cu_seqlens_q,
            metadata.seq_lens,
            metadata.max_seqlen_q,
            layer,
            sinks,
            scales,
        )

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """See `AttentionBackend`: writing and attending in one kernel, a shared prefix read once."""
        out, lse = decode_attention.decode(
            query,
            key,
            value,
            key_cache,
            value_cache,
            metadata.slot_mapping,
            metadata.block_tables,
            metadata.seq_lens,
            layer,
            scales,
        )
        if metadata.shared_prefix is not None:
            out, lse = self._merge_shared_prefix(query, key_cache, value_cache, metadata, layer, out, lse)
        return out if sinks is None else _with_sinks(out, lse, sinks)

    def _merge_shared_prefix(
        self,
        query: Tensor,
        key_cache: Tensor,
        value_cache: Tensor,
        metadata: AttentionMetadata,
        layer: Layer,
        out: Tensor,
        lse: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Cascade attention: all queries are one long query over the shared pages, which are then read once."""
        from flash_attn import flash_attn_varlen_func

        assert metadata.shared_prefix is not None
        prefix_out, prefix_lse, _ = flash_attn_varlen_func(
            query, key_cache, value_cache, metadata.shared_prefix.cu_seqlens_q, metadata.shared_prefix.cu_seqlens_k,
            len(query), metadata.shared_prefix.block_table.shape[1] * key_cache.shape[1],
            block_table=metadata.shared_prefix.block_table, causal=False, return_attn_probs=True,
            **_flash_kwargs(layer),
        )  # fmt: skip
        return kernels.merge_attn_states(prefix_out, prefix_lse, out.contiguous(), lse.contiguous())


def _flash_kwargs(layer: Layer) -> dict[str, object]:
    return {
        "softmax_scale": layer.scale,
        "window_size": (-1, -1) if layer.window is None else (layer.window - 1, 0),
        "softcap": layer.softcap or 0.0,
    }


def _with_sinks(out: Tensor, lse: Tensor, sinks: Tensor) -> Tensor:
    """A sink takes its share of the probability: out (tokens, heads, size), lse (tokens, heads)."""
    return (out * torch.sigmoid(lse - sinks.float())[..., None]).to(out.dtype)
