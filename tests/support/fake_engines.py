"""Engines that misbehave on purpose, loaded by name (`fake_engines:Class`) in the engine's process."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator

import numpy as np

from batchrun.engine.instant import InstantEngine
from batchrun.engine.protocol import Completion, EngineSpec, Request
from batchrun.errors import FaultCode, ModelError, RowFault

KILL, RAISE, SLEEP, FAULT, ENVIRONMENT = -1, -2, -3, -4, -5


class ObeyingEngine(InstantEngine):
    """An instant engine that does what a prompt's first token says."""

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        for completion in super().generate(requests):
            order = completion.token_ids[0]
            if order == KILL:
                print("the last thing it said", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
            if order == RAISE:
                raise ValueError("told to raise")
            if order == SLEEP:
                time.sleep(completion.token_ids[1] / 1000)
            if order == FAULT:
                fault = RowFault(FaultCode.BAD_LOGITS, "told to")
                completion = Completion(completion.id, np.empty(0, np.int32), "error", fault)
            if order == ENVIRONMENT:
                threads = np.array([int(os.environ["OMP_NUM_THREADS"])], np.int32)
                completion = Completion(completion.id, threads, "length")
            yield completion


class UnloadableEngine(InstantEngine):
    @classmethod
    def load(cls, spec: EngineSpec) -> UnloadableEngine:
        raise ModelError("no such weights", spec.model_path, "copy them")


class BrokenEngine(InstantEngine):
    @classmethod
    def load(cls, spec: EngineSpec) -> BrokenEngine:
        raise ZeroDivisionError("while loading")


class NoEngine:
    pass
