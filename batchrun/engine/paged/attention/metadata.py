"""What attention is told of one model call, and what every backend of attention can do."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.cascade import CascadePlan

Spans = list[tuple[int, int, int]]
"""Sequences that attention computes together: the first, the one behind the last, and the tokens of the longest."""


LONG_SEQLEN, SHORT_SEQLEN = 2048, 128
"""Tokens: attention of prefills works in larger blocks from the one on, and grids are made for the longest sequence."""


@dataclass(frozen=True, slots=True)
class SharedPrefixes:
    """What groups of a call's sequences begin with, to be read once for each group.

    `starts` (sequences,) int32: how many leading tokens of a sequence those are, 0 without a group; of a prefill,
    `planned` are the same on the host. `members` and `items`: see `CascadePlan`, filled up with zeros, and so
    `block_queries`. `results` is how many there may be.
    """

    starts: Tensor
    members: Tensor
    items: Tensor
    block_queries: int
    results: int
    planned: NDArray[np.int32] | None = None

    @classmethod
    def of(cls, plan: CascadePlan, upload: Callable[[NDArray[np.int32]], Tensor]) -> Self:
        """A plan on the device."""
        starts, members, items = map(upload, (plan.starts, plan.members, plan.items))
        return cls(starts, members, items, plan.block_queries, plan.results, plan.starts)

    def starts_of(self, first: int, stop: int) -> Tensor | None:
        """Those of some of a prefill's sequences; None where no group has any of them."""
        assert self.planned is not None
        return self.starts[first:stop] if self.planned[first:stop].any() else None


@dataclass(frozen=True, slots=True)
class PrefillTurn:
    """Sequences of a prefill whose attention is computed before that of the next ones.

    `query_spans` are those to compute together, see `shapes.query_spans`, and `shared_prefixes` what groups of them
    begin with. Where the cache is in fp8, `widened` (pages,) int64 are to be brought back to the model's format first.
    """

    query_spans: Spans
    shared_prefixes: SharedPrefixes | None = None
    widened: Tensor | None = None


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one model call are in the pool.

    `slot_mapping` (tokens,) int64 is where each token's key and value go, page * page size + offset. `block_tables`
    (sequences, pages) int32 and `seq_lens` (sequences,) int32 are each sequence's pages and tokens, this call's
    included. A decode step has one token per sequence, and may have `shared_prefixes`. A prefill has `cu_seqlens_q`
    (sequences + 1,) int32, where each sequence's tokens begin in the prefill batch; `turns`, which cover its sequences;
    `no_context` when no sequence has older tokens. Where a turn has `widened` pages, the `block_tables` of its
    sequences count among those.
    """

    slot_mapping: Tensor
    block_tables: Tensor
    seq_lens: Tensor
    cu_seqlens_q: Tensor | None = None
    turns: list[PrefillTurn] = field(default_factory=list)
    no_context: bool = False
    shared_prefixes: SharedPrefixes | None = None


class AttentionBackend(Protocol):
    """Attention over pages, with the call's own keys and values, which it also writes to the pages.

    `key_cache` and `value_cache` are (pages, page size, kv heads, head size) of one layer; query, key and value are
    (tokens, heads, head size); `sinks` (query heads,) are logits without a value, where a model has them. Where the
    cache is in fp8, `scales` (2, pages, kv heads, page size) float32 are those of the layer's keys and values. Gives
    (tokens, query heads, head size). `notes` are for the user, as `EngineStats.notes`.
    """

    name: str
    widens_pages: bool
    notes: Sequence[str]

    def cascade_queries(self, layer: Layer) -> tuple[int, int] | None:
        """Queries of sequences that read a shared prefix together: of a small and a large block of threads, no fewer
        than query heads for a key head. None where each sequence reads its own."""
        ...

    def prefill(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The call's tokens are the sequences' next ones, end to end, any number of each."""
        ...

    def decode(
        self, query: Tensor, key: Tensor, value: Tensor, key_cache: Tensor, value_cache: Tensor,
        metadata: AttentionMetadata, layer: Layer, sinks: Tensor | None, scales: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """The call's tokens are one for each sequence, its last."""
        ...
