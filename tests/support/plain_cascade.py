"""Cascade attention in plain torch: what the kernels make of a plan, on a CPU and in float32."""

from __future__ import annotations

import torch
from torch import Tensor

from batchrun.engine.paged.architecture import Layer
from batchrun.engine.paged.gathered import GatheredPages, _read, _write
from batchrun.engine.paged.metadata import AttentionMetadata


class PlainCascade(GatheredPages):
    """Reads for each group what its items say, and for each row what is behind its prefix. `groups` counts the most
    groups of a step."""

    def __init__(self) -> None:
        self.groups, self.steps = 0, 0

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
        shared, out = metadata.shared_prefixes, torch.empty_like(query)
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
        assert max(results) < max(2 * len(query), 1024)
        parts: dict[int, list[tuple[Tensor, Tensor]]] = {row: [] for row in range(len(query))}
        used = []
        for row, first, apart, pieces in members:
            assert not parts[row]
            used += [first + piece * apart for piece in range(pieces)]
            parts[row] += [results[first + piece * apart] for piece in range(pieces)]
        assert sorted(used) == sorted(results)
        for row, own in parts.items():
            length, start = int(metadata.seq_lens[row]), int(shared.starts[row])
            assert bool(start) == bool(own)
            own.append(
                attention(
                    query[row],
                    key_cache,
                    value_cache,
                    metadata.block_tables[row],
                    start,
                    length,
                    layer,
                    scales,
                )
            )
            weights = torch.stack([lse for _, lse in own]).softmax(0)
            out[row] = sum(w[:, None] * o for w, (o, _) in zip(weights, own, strict=True))
        self.groups = max(self.groups, len({leader for _, _, leader, *_ in items}))
        self.steps += 1
        return out


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
