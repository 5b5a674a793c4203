"""Which pages in fp8 a prefill brings back to the model's format, and in how many turns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.paged.attention.metadata import Spans
from batchrun.engine.paged.schedule.page_pool import NULL_PAGE

WIDENED_TOKENS = 1 << 16
"""Of pages that are brought back at once, unless one sequence has more: 268 MB with 8 heads of 128 numbers."""


@dataclass(frozen=True, slots=True)
class WidenedPages:
    """`pages` has for each turn those of its sequences, each page once, (pages,) int64. `block_tables` (sequences,
    pages) count among those of the sequence's turn. `spans` has for each turn its part of `shapes.query_spans`."""

    block_tables: NDArray[np.int32]
    pages: list[NDArray[np.int64]]
    spans: list[Spans]

    @classmethod
    def of(
        cls,
        spans: Spans,
        block_tables: NDArray[np.int32],
        query_lens: list[int],
        seq_lens: NDArray[np.int64],
        page_size: int,
    ) -> Self:
        """Of sequences with `block_tables` (sequences, pages), new and all tokens (sequences,)."""
        used = np.arange(block_tables.shape[1]) < -(-seq_lens // page_size)[:, None]
        tables = np.where(used, block_tables, NULL_PAGE)
        most, pages, parts = WIDENED_TOKENS // page_size, [], []
        open_turns = [(0, len(tables))]
        while open_turns:
            first, stop = open_turns.pop()
            own, places = np.unique(tables[first:stop], return_inverse=True)
            if len(own) > most and stop - first > 1:
                middle = (first + stop) // 2
                open_turns += [(middle, stop), (first, middle)]
            else:
                tables[first:stop] = places.reshape(stop - first, -1)
                pages.append(own.astype(np.int64))
                parts.append(_within(spans, first, stop, query_lens))
        return cls(tables, pages, parts)


def _within(spans: Spans, first: int, stop: int, query_lens: list[int]) -> Spans:
    """The spans' parts between `first` and `stop`."""
    parts = [(max(begin, first), min(end, stop)) for begin, end, _ in spans]
    return [(begin, end, max(query_lens[begin:end])) for begin, end in parts if begin < end]
