"""An engine without a model: what is left of a run's time is the data path's."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Self

from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request


class InstantEngine:
    """Answers every request at once with the first `max_new_tokens` tokens of its own prompt."""

    def __init__(self) -> None:
        self.stats = EngineStats(engine="instant")

    @classmethod
    def load(cls, spec: EngineSpec) -> Self:
        """There is nothing to load."""
        return cls()

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        """See `Engine`."""
        stats = self.stats
        for request in requests:
            if request is None:
                continue
            answer = request.token_ids[: request.max_new_tokens]
            stats.requests += 1
            stats.completions += 1
            stats.prompt_tokens += len(request.token_ids)
            stats.output_tokens += len(answer)
            stats.computed_tokens += len(request.token_ids) + len(answer)
            yield Completion(request.id, answer, "length")
