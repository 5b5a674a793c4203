"""A real engine over several ranks whose answers are known: what it computes decides how long each takes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import numpy as np
from mirror_engine import MirrorEngine

from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import Completion, EngineSpec, Request
from tests.chaos.rows import ROOM


class MirrorRanks(MirrorEngine):
    """As `MirrorEngine`, with a token for each that the model gives a row."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.engine = PagedEngine.load(replace(spec, device="cpu", stop_token_ids=()))
        self.in_hand: dict[int, tuple[Request, int]] = {}

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        for completion in self.engine.generate(self.feed(requests)):
            request, row = self.in_hand.pop(completion.id)
            tokens = len(completion.token_ids)
            self.stats.output_tokens += tokens - len(request.generated)
            self.stats.steps = self.engine.stats.steps
            answer = request.token_ids[::-1][:tokens].astype(np.int32).tolist()
            yield self.give(request, row, answer, completion.finish_reason == "length")

    def feed(self, requests: Iterator[Request | None]) -> Iterator[Request | None]:
        while True:
            request = None
            if len(self.in_hand) < ROOM:
                try:
                    request = next(requests)
                except StopIteration:
                    return
            if request is not None:
                self.in_hand[request.id] = request, self.take(request)
                request.max_new_tokens = min(len(request.token_ids), request.max_new_tokens)
            yield request
