"""The scored tokens of a prefill batch: where their hidden states are, and whose they are."""

from __future__ import annotations

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.paged.schedule.batches import PrefillChunk
from batchrun.engine.paged.schedule.sequence import Sequence


@dataclass(frozen=True, slots=True)
class ScoredChunks:
    """`columns` (places,) int64 are the tokens of the prefill batch whose hidden states are wanted, `tokens` (tokens,)
    the scored ones and `places` (tokens,), ascending, which of the columns each comes after, both int64.

    `parts` says whose they are: a sequence, how many of its scored tokens came before, how many are here, and
    whether these are its last.
    """

    columns: NDArray[np.int64]
    tokens: NDArray[np.int64]
    places: NDArray[np.int64]
    parts: list[tuple[Sequence, int, int, bool]]

    @classmethod
    def of(cls, chunks: Many[PrefillChunk], begins: NDArray[np.int64]) -> ScoredChunks | None:
        """Those of `chunks`, which begin at `begins` in the prefill batch; None where nothing is scored."""
        columns, tokens, parts = [], [], []
        for chunk, begin in zip(chunks, begins.tolist(), strict=False):
            scored = chunk.sequence.request.scored
            if scored is None:
                continue
            behind = len(chunk.sequence.prompt) - 1 - scored.back
            first, last = np.searchsorted(behind, [chunk.start, chunk.stop]).tolist()
            if last > first:
                columns.append(begin - chunk.start + behind[first:last].astype(np.int64))
                tokens.append(scored.token_ids[first:last].astype(np.int64))
                parts.append((chunk.sequence, first, last - first, chunk.complete))
        if not parts:
            return None
        unique, places = np.unique(np.concatenate(columns), return_inverse=True)
        return cls(unique, np.concatenate(tokens), places.reshape(-1).astype(np.int64), parts)

    def take(self, logprobs: NDArray[np.float32]) -> list[Sequence]:
        """Gives (tokens,) log probabilities to their sequences; those that have all of theirs now."""
        begin, whole = 0, []
        for sequence, first, count, last in self.parts:
            if sequence.scores is None:
                assert sequence.request.scored is not None
                sequence.scores = np.empty(len(sequence.request.scored.token_ids), np.float32)
            sequence.scores[first : first + count] = logprobs[begin : begin + count]
            begin += count
            if last:
                whole.append(sequence)
        return whole
