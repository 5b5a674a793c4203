"""An engine that answers at a set speed by sleeping, with the counters of a paged one: a GPU's load without a GPU."""

from __future__ import annotations

import os
import time
from collections import deque
from collections.abc import Iterator
from typing import Self

from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request

ROWS_PER_SECOND = "BATCHRUN_TEST_ROWS_PER_SECOND"
# Seconds between two looks at what is due.
STEP = 0.25
PAGES = 100_000.0


class SteadyEngine:
    """Holds every row that comes and finishes them in order, so many a second, with tokens of their own prompt."""

    def __init__(self, rows_per_second: float) -> None:
        self.rate = rows_per_second
        self.stats = EngineStats(engine="paged", attention="none", device="a stand-in", dtype="bfloat16")

    @classmethod
    def load(cls, spec: EngineSpec) -> Self:
        return cls(float(os.environ[ROWS_PER_SECOND]))

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        held: deque[Request] = deque()
        due, last = 0.0, time.monotonic()
        # Without rows in hand the iterator itself waits, and so costs nothing.
        for request in requests:
            if request is not None:
                if not held:
                    last = time.monotonic()
                held.append(request)
                self.stats.requests += 1
                continue
            time.sleep(STEP)
            now = time.monotonic()
            due = min(due + (now - last) * self.rate, len(held))
            self.stats.busy_seconds += now - last
            last = now
            while due >= 1 and held:
                due -= 1
                yield self._answer(held.popleft())
            self._gauge(held)

    def _answer(self, request: Request) -> Completion:
        answer = request.token_ids[: request.max_new_tokens]
        stats = self.stats
        stats.completions += 1
        stats.prompt_tokens += len(request.token_ids)
        stats.output_tokens += len(answer)
        stats.computed_tokens += len(request.token_ids) + len(answer)
        return Completion(request.id, answer, "length")

    def _gauge(self, held: deque[Request]) -> None:
        stats = self.stats
        stats.batches, stats.steps = stats.batches + 1, stats.steps + 8
        stats.gauges = {
            "pages": PAGES,
            "pages_free": PAGES - len(held),
            "active_rows": float(len(held)),
            "active_prompt_tokens": float(sum(len(request.token_ids) for request in held)),
            "active_output_tokens": 0.0,
        }
