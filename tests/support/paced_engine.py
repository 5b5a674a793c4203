"""An engine of a set speed that sleeps, so that it keeps its pace on a machine that is busy with other things."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from engines import EchoEngine, waiting_now

from batchrun.engine.protocol import Completion, EngineSpec, Request

STEP = "BATCHRUN_TEST_STEP"  # seconds for a token of every row
SLOW = "BATCHRUN_TEST_SLOW"  # a file: whose engine makes it is slow by SLOWNESS
SLOWNESS = 2.0
ROOM = 16  # rows at once


class PacedEngine(EchoEngine):
    """Answers with the prompt, a token of each of ROOM rows in a step, the longest of all that wait first.

    A line of the log for each change between nothing to do and something: "TIME busy" or "TIME idle"; one for each
    row that ended: "TIME row SEED".
    """

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        self.step = float(os.environ[STEP])
        if (slow := os.environ.get(SLOW)) and not Path(slow).exists():
            Path(slow).touch()
            self.step *= SLOWNESS

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        waiting: list[Request] = []
        running: dict[int, tuple[Request, int]] = {}
        more, due = True, 0.0
        while more or waiting or running:
            if more:
                self.note("idle", only=not running and not waiting)
                new, more = waiting_now(requests, 10_000)
                self.note("busy", only=bool(new) and not running and not waiting)
                for request in new:
                    request.waiting = True
                waiting = sorted([*waiting, *new], key=lambda one: (one.stream, -len(one.token_ids)))
                self.stats.requests += len(new)
            yield from (one.so_far() for one in waiting if one.cancelled)
            waiting = [one for one in waiting if not one.cancelled]
            while waiting and len(running) < ROOM:
                request = waiting.pop(0)
                request.waiting = False
                running[request.id] = request, len(request.generated)
            if not running:
                continue
            now = time.monotonic()
            # Steps that came late are caught up with: its pace is that of the clock.
            due = due + self.step if now - due < 1 else now + self.step
            time.sleep(max(0.0, due - now))
            self.stats.steps += 1
            self.stats.gauges["active_output_tokens"] = float(sum(length for _, length in running.values()))
            for number, (request, length) in list(running.items()):
                running[number] = request, length + 1
                if request.cancelled:
                    del running[number]
                    yield request.so_far(request.token_ids[: length + 1])
                elif length + 1 >= min(len(request.token_ids), request.max_new_tokens):
                    del running[number]
                    self.note(f"row {request.row_seed}")
                    yield self.answer(request)

    def note(self, what: str, only: bool = True) -> None:
        if self.log and only:
            self.log.write(f"{time.time()} {what}\n")
