"""Cascade attention in plain torch: what the kernels make of a plan, on a CPU and in float32."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from torch import Tensor

from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.gathered import GatheredPages, _read, _write
from batchrun.engine.paged.attention.metadata import AttentionMetadata


class PlainCascade(GatheredPages):
    """Reads for each group what its items say, and for each token what is behind its prefix. `groups` counts the most
    groups of a step, `prefills` those that had any."""

    def __init__(self) -> None:
        self.groups, self.steps, self.prefills = 0, 0, 0

    def cascade_queries(self, layer: Layer) -> tuple[int, int]:
        """Of three and of five sequences."""
        group_size = layer.query_heads // layer.kv_heads
        return 3 * group_size, 5 * group_size

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        if metadata.shared_prefixes is None:
            return super().decode(query, key, value, key_cache, value_cache, metadata, layer, sinks, scales)
        _write(key, value, key_cache, value_cache, scales, metadata)
        out, groups = _joined(
            query, key_cache, value_cache, metadata, layer, list(range(len(query))), metadata.seq_lens.tolist(),
            scales,
        )  # fmt: skip
        self.groups = max(self.groups, groups)
        self.steps += 1
        return out

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        (turn,) = metadata.turns
        if turn.shared_prefixes is None:
            return super().prefill(query, key, value, key_cache, value_cache, metadata, layer, sinks, scales)
        _write(key, value, key_cache, value_cache, scales, metadata)
        sequences, lengths = [], []
        bounds = metadata.cu_seqlens_q.tolist()
        for number, (first, stop) in enumerate(itertools.pairwise(bounds)):
            length = int(metadata.seq_lens[number])
            sequences += [number] * (stop - first)
            lengths += range(length - (stop - first) + 1, length + 1)
        self.prefills += 1
        told = replace(metadata, shared_prefixes=turn.shared_prefixes)
        return _joined(query, key_cache, value_cache, told, layer, sequences, lengths, scales)[0]


def _joined(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, metadata: AttentionMetadata, layer: Layer,
    sequences: list[int], lengths: list[int], scales: Tensor | None = None,
) -> tuple[Tensor, int]:  # fmt: skip
    """Attention of tokens of these sequences over so many keys each, and how many groups there are."""
    shared, out = metadata.shared_prefixes, torch.empty_like(query)
    assert shared is not None
    items = [item for item in shared.items.tolist() if item[1]]
    members = [member for member in shared.members.tolist() if member[3]]
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for first, count, leader, begin, stop, result in items:
        assert 0 < count * (layer.query_heads // layer.kv_heads) <= shared.block_queries
        for number in range(count):
            assert result + number not in results
            results[result + number] = attention(
                query[members[first + number][0]], key_cache, value_cache, metadata.block_tables[leader],
                begin, stop, layer, scales,
            )  # fmt: skip
    assert max(results) < shared.results
    parts: dict[int, list[tuple[Tensor, Tensor]]] = {token: [] for token in range(len(query))}
    used = []
    for token, first, apart, pieces in members:
        assert not parts[token]
        used += [first + piece * apart for piece in range(pieces)]
        parts[token] += [results[first + piece * apart] for piece in range(pieces)]
    assert sorted(used) == sorted(results)
    for token, own in parts.items():
        pages, start = metadata.block_tables[sequences[token]], int(shared.starts[sequences[token]])
        assert bool(start) == bool(own)
        assert start < lengths[token]
        mine = query[token], key_cache, value_cache, pages, start, lengths[token], layer, scales
        own.append(attention(*mine))
        weights = torch.stack([lse for _, lse in own]).softmax(0)
        out[token] = sum(w[:, None] * o for w, (o, _) in zip(weights, own, strict=True))
    return out, len({leader for _, _, leader, *_ in items})


def attention(
    query: Tensor, key_cache: Tensor, value_cache: Tensor, pages: Tensor, first: int, stop: int, layer: Layer,
    scales: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One query (heads, size) over some keys of a sequence; and the log-sum-exp of the scores (heads,)."""
    group = query.shape[0] // layer.kv_heads
    keys, values = (
        x.flatten(0, 1)[first:stop].float().repeat_interleave(group, dim=1)
        for x in _read(key_cache, value_cache, scales, pages.long(), query.dtype)
    )
    scores = torch.einsum("hd,khd->hk", query.float(), keys) * layer.scale
    if layer.softcap is not None:
        scores = torch.tanh(scores / layer.softcap) * layer.softcap
    return torch.einsum("hk,khd->hd", scores.softmax(-1), values).to(query.dtype), scores.logsumexp(-1)
