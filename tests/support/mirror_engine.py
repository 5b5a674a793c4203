"""An engine whose answers are a function of their prompts, token by token, and whose log says what it did."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator

import numpy as np
from engines import EchoEngine, waiting_now
from faulty_engines import text_of

from batchrun.engine.protocol import Completion, Request
from batchrun.errors import FaultCode, RowFault
from tests.chaos.rows import DEADLY, OUTSIZE, ROOM


class MirrorEngine(EchoEngine):
    """Answers with the prompt backwards, one token of every row in a step of `BATCHRUN_TEST_DELAY` seconds.

    A line of the log for each row taken ("TIME take ROW FROM", the begun tokens that came with it), and for each
    row given back ("TIME give ROW TO REASON").
    """

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        running: dict[int, tuple[Request, list[int], int]] = {}
        more = True
        while more or running:
            new, more = waiting_now(requests, ROOM - len(running)) if more else ([], False)
            for request in new:
                running[request.id] = request, request.generated.tolist(), self.take(request)
            time.sleep(self.delay)
            for key, (request, answer, row) in list(running.items()):
                answer.append(int(request.token_ids[-1 - len(answer)]))
                self.stats.output_tokens += 1
                self.stats.steps += 1
                ended = len(answer) == min(len(request.token_ids), request.max_new_tokens)
                if ended or request.cancelled:
                    del running[key]
                    yield self.give(request, row, answer, ended)

    def take(self, request: Request) -> int:
        """The number of the row."""
        text = text_of(request)
        row = int(text.split()[1])
        self.stats.requests += 1
        self.stats.prompt_tokens += len(request.token_ids)
        begun = len(request.generated)
        expected = request.token_ids[::-1][:begun]
        self.note(f"take {row} {begun if np.array_equal(request.generated, expected) else 'wrong'}")
        if DEADLY in text:
            os.kill(os.getpid(), signal.SIGKILL)
        return row

    def give(self, request: Request, row: int, answer: list[int], ended: bool) -> Completion:
        self.stats.completions += ended
        if not ended:
            self.note(f"give {row} {len(answer)} cancelled")
            return request.so_far(np.array(answer, np.int32))
        if OUTSIZE in text_of(request):
            fault = RowFault(FaultCode.OUT_OF_MEMORY, "the row fits no device")
            return Completion(request.id, np.empty(0, np.int32), "error", fault)
        self.note(f"give {row} {len(answer)} length")
        return Completion(request.id, np.array(answer, np.int32), "length")

    def note(self, what: str) -> None:
        if self.log:
            self.log.write(f"{time.time()} {what}\n")
