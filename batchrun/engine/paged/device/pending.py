"""Results of a prefill or decode batch on their way from the device."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import torch
from torch import Tensor

from batchrun.engine.paged.device.scored_chunks import ScoredChunks
from batchrun.engine.paged.schedule.sequence import Sequence
from batchrun.engine.protocol import TokenValues

# A moment on the device: an event of its stream, or on a CPU, which computes while the host waits, the time.
Mark = torch.cuda.Event | float


@dataclass(frozen=True, slots=True)
class Pending:
    """Tokens on their way back: `tokens` (steps, at least as many as sequences) int32, valid once `done` happened, and
    so the log probabilities of `scored` tokens."""

    sequences: list[Sequence]
    tokens: Tensor
    began: Mark
    done: Mark
    values: dict[str, Tensor] = field(default_factory=dict)
    scored: ScoredChunks | None = None
    logprobs: Tensor | None = None

    def read(self) -> list[list[int]]:
        """Waits, and gives each sequence's tokens: NO_TOKEN after its end, INVALID_TOKEN where it has no next one,
        SETTLED and below where the rest is known."""
        if not isinstance(self.done, float):
            self.done.synchronize()
        columns: list[list[int]] = self.tokens[:, : len(self.sequences)].t().tolist()
        return columns

    def values_of(self, number: int, tokens: int) -> TokenValues:
        """Those of the first so many tokens of a sequence, by its place in `sequences`; once it has been read."""
        # A copy: the rest of the memory is not kept for as long as the sequence runs.
        return {name: column[:tokens, number].numpy().copy() for name, column in self.values.items()}

    def take_scores(self) -> list[Sequence]:
        """Gives sequences the log probabilities of their scored tokens; those that have all. Once it has been read."""
        if self.scored is None or self.logprobs is None:
            return []
        return self.scored.take(self.logprobs.numpy())

    @property
    def seconds(self) -> float:
        """How long the device worked on it; once it has been read."""
        if isinstance(self.began, float) or isinstance(self.done, float):
            return cast(float, self.done) - cast(float, self.began)
        milliseconds: float = self.began.elapsed_time(self.done)
        return milliseconds / 1000
