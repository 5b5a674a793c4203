"""Engines for tests of the runner: cheap, and what they were asked stays on disk for counting."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Self

import numpy as np

from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.errors import FaultCode, ModelError, RowFault

LOG = "BATCHRUN_TEST_LOG"  # a folder: one file per engine process, a line per request: time, row seed
DELAY = "BATCHRUN_TEST_DELAY"  # seconds per row


def waiting_now(requests: Iterator[Request | None], room: int) -> tuple[list[Request], bool]:
    """At most `room` requests that wait now, and whether more may come."""
    taken: list[Request] = []
    while len(taken) < room:
        try:
            request = next(requests)
        except StopIteration:
            return taken, False
        if request is None:
            break
        taken.append(request)
    return taken, True


class EchoEngine:
    """Answers with the prompt's first tokens, slowly and in a shuffled order."""

    def __init__(self, spec: EngineSpec) -> None:
        self.stats = EngineStats(engine="echo", device="cpu")
        self.delay = float(os.environ.get(DELAY, "0"))
        folder = os.environ.get(LOG)
        self.log = open(f"{folder}/{os.getpid()}-{time.time_ns()}", "a", buffering=1) if folder else None  # noqa: SIM115

    @classmethod
    def load(cls, spec: EngineSpec) -> Self:
        return cls(spec)

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        waiting: list[Request] = []
        more = True
        while more or waiting:
            new, more = waiting_now(requests, 8 - len(waiting)) if more else ([], False)
            waiting += new
            self.stats.requests += len(new)
            for request in new:
                if self.log:
                    self.log.write(f"{time.time()} {request.row_seed}\n")
            if waiting:
                time.sleep(self.delay)
                yield self.answer(waiting.pop(len(waiting) // 2))

    def answer(self, request: Request) -> Completion:
        ids = request.token_ids[: request.max_new_tokens]
        self.stats.completions += 1
        self.stats.prompt_tokens += len(request.token_ids)
        self.stats.output_tokens += len(ids)
        return Completion(request.id, ids, "length")


class FailingEngine(EchoEngine):
    """Every row but the shortest prompts ends in a fault, as under a model that is broken."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.delay = 0.005

    def answer(self, request: Request) -> Completion:
        if len(request.token_ids) < 4:
            return super().answer(request)
        fault = RowFault(FaultCode.BAD_LOGITS, "not a number")
        return Completion(request.id, np.array([], np.int32), "error", fault)


class FailingSecondsEngine(FailingEngine):
    """The same, slowly enough to be seen failing."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.delay = 0.2


class SecondsEngine(EchoEngine):
    """Takes seconds over every row, so that a run is surely still at work when it is interrupted."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.delay = max(self.delay, 0.2)


class EndingEngine(EchoEngine):
    """Each fails for good after 25 rows, as a model would that cannot do what the job asks."""

    def answer(self, request: Request) -> Completion:
        if self.stats.completions == 25:
            raise ModelError("cannot do that", "here", "take another one")
        return super().answer(request)
