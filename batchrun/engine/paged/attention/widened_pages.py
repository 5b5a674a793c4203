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
    """`spans` as `shapes.query_spans` has them, or parts of them; `block_tables` (sequences, pages) count among the
    pages of their span; `pages` (pages,) int64 are those of one span after another, each once, and `page_spans` where
    they begin and end."""

    spans: Spans
    block_tables: NDArray[np.int32]
    pages: NDArray[np.int64]
    page_spans: list[tuple[int, int]]

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
        most, turns = WIDENED_TOKENS // page_size, []
        open_spans = [(first, stop) for first, stop, _ in reversed(spans)]
        while open_spans:
            first, stop = open_spans.pop()
            own, places = np.unique(tables[first:stop], return_inverse=True)
            if len(own) > most and stop - first > 1:
                middle = (first + stop) // 2
                open_spans += [(middle, stop), (first, middle)]
            else:
                tables[first:stop] = places.reshape(stop - first, -1)
                turns.append((first, stop, own))
        ends = np.cumsum([len(own) for *_, own in turns]).tolist()
        return cls(
            [(first, stop, max(query_lens[first:stop])) for first, stop, _ in turns],
            tables,
            np.concatenate([own for *_, own in turns]).astype(np.int64),
            list(zip([0, *ends[:-1]], ends, strict=True)),
        )
