"""Engines that fail as real ones do: on a certain row, for a while, or for ever. What they did stays in a log."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import numpy as np
from engines import EchoEngine, waiting_now
from tokenizers.pre_tokenizers import ByteLevel

from batchrun.engine.instant import InstantEngine
from batchrun.engine.protocol import Completion, EngineSpec, Request
from batchrun.errors import FaultCode, RowFault

_ALPHABET = sorted(ByteLevel.alphabet())


def text_of(request: Request) -> str:
    """The prompt behind the ids of the tests' byte tokenizer."""
    return "".join(_ALPHABET[token - 3] for token in request.token_ids).replace("Ġ", " ")


def notes(spec: EngineSpec) -> Path:
    """A folder for what engines of one model folder, of any process, tell the test."""
    folder = Path(tempfile.gettempdir()) / f"batchrun-notes-{Path(spec.model_path).name}"
    folder.mkdir(exist_ok=True)
    return folder


class NotedEngine(EchoEngine):
    """Notes each process that loaded it, and each request: one file per process of a worker, a line per request."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        place = notes(spec)
        self.first = not any(place.iterdir())
        self.notes = (place / f"{time.time_ns()}-{os.getppid()}-{os.getpid()}").open("w", buffering=1)

    def answer(self, request: Request) -> Completion:
        self.notes.write(f"{text_of(request)}\n")
        return super().answer(request)


class EngineKiller(NotedEngine):
    """Row 1 kills the engine."""

    def answer(self, request: Request) -> Completion:
        if text_of(request).startswith("row 1 "):
            self.kill()
        return super().answer(request)

    def kill(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


class WorkerKiller(EngineKiller):
    """Row 1 kills the worker, and the engine with it."""

    def kill(self) -> None:
        os.kill(os.getppid(), signal.SIGKILL)
        time.sleep(60)


class BrokenKernel(EngineKiller):
    """Every row raises what a broken kernel would."""

    def answer(self, request: Request) -> Completion:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")


class Unloadable(NotedEngine):
    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        os.kill(os.getpid(), signal.SIGKILL)


class HangingEngine(NotedEngine):
    """The first process hangs for ever in its third row."""

    def answer(self, request: Request) -> Completion:
        if self.first and self.stats.completions == 2:
            time.sleep(3600)
        return super().answer(request)


class DoubtfulEngine(NotedEngine):
    """The first process fails every odd row; rows 4 and 5 repeat one token in every process."""

    def answer(self, request: Request) -> Completion:
        completion = super().answer(request)
        number = int(text_of(request).split()[1])
        if number in (4, 5):
            return Completion(request.id, np.full(request.max_new_tokens, 7, np.int32), "length")
        if self.first and number % 2:
            fault = RowFault(FaultCode.BAD_LOGITS, "not a number")
            return Completion(request.id, np.empty(0, np.int32), "error", fault)
        return completion


class RepeatingEngine(NotedEngine):
    """One row in five repeats one token in every process."""

    def answer(self, request: Request) -> Completion:
        if int(text_of(request).split()[1]) % 5 == 4:
            return Completion(request.id, np.full(request.max_new_tokens, 7, np.int32), "length")
        return super().answer(request)


class SteppingEngine(NotedEngine):
    """Token by token, all rows at once: each answer is its prompt, a token every so often.

    Lets go of rows as engines do, and notes how many tokens it has generated: "tokens N".
    """

    STEP = 0.05

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        running: dict[int, tuple[Request, list[int]]] = {}
        more = True
        while more or running:
            new, more = waiting_now(requests, 16 - len(running)) if more else ([], False)
            for request in new:
                running[request.id] = request, request.generated.tolist()
                self.notes.write(f"{text_of(request)} from {len(request.generated)}\n")
            time.sleep(self.STEP)
            for number, (request, answer) in list(running.items()):
                answer.append(int(request.token_ids[len(answer)]))
                self.stats.output_tokens += 1
                ended = len(answer) == min(len(request.token_ids), request.max_new_tokens)
                if ended or request.cancelled:
                    del running[number]
                    tokens = np.array(answer, np.int32)
                    yield Completion(request.id, tokens, "length") if ended else request.so_far(tokens)
            self.notes.write(f"tokens {self.stats.output_tokens}\n")


ABORT = f"""\
terminate called after throwing an instance of 'c10::AcceleratorError'
  what():  CUDA error: an illegal memory access was encountered
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.

Exception raised from c10_cuda_check_implementation at /pytorch/c10/cuda/CUDAException.cpp:44 (most recent call first):
{"".join(f"frame #{i}: <unknown function> + 0x11fb7 (0x7f1c2b611fb7 in libc10_cuda.so){chr(10)}" for i in range(24))}\
frame #24: Py_RunMain + 0x232 (0x5581a8f2d2e2 in /venv/bin/python)
"""


class AbortingEngine(NotedEngine):
    """Aborts at its first row, as torch does; a line for each of a few hundred steps comes before it."""

    def answer(self, request: Request) -> Completion:
        self.abort()

    def abort(self) -> NoReturn:
        steps = "\n".join(f"step {i}, key hunter2" for i in range(300))
        print(steps, ABORT, sep="\n", end="", file=sys.stderr, flush=True)
        os.abort()


class LateAbortingEngine(AbortingEngine):
    """The first process finishes twelve rows before it aborts."""

    def answer(self, request: Request) -> Completion:
        if self.first and self.stats.completions < 12:
            return NotedEngine.answer(self, request)
        time.sleep(0.5)
        self.abort()


class WindowKiller(NotedEngine):
    """Takes all rows that wait before it finishes any, and is killed by row 1 among them."""

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        more = True
        while more:
            window, more = waiting_now(requests, 1000)
            if any(text_of(request).startswith("row 1 ") for request in window):
                os.kill(os.getpid(), signal.SIGKILL)
            for request in window:
                yield self.answer(request)


class BadMachineEngine(AbortingEngine):
    """Always aborts on the worker that loaded one first; slow to load on all others."""

    def __init__(self, spec: EngineSpec) -> None:
        super().__init__(spec)
        bad = notes(spec).parent / f"{notes(spec).name}.bad"
        with contextlib.suppress(FileExistsError), bad.open("x") as file:
            file.write(str(os.getppid()))
        self.is_bad = bad.read_text() == str(os.getppid())
        if not self.is_bad:
            time.sleep(8)

    def answer(self, request: Request) -> Completion:
        return super().answer(request) if self.is_bad else NotedEngine.answer(self, request)


class InstantOnGpus(InstantEngine):
    """Notes how many GPUs it is told to use, and which ones its process sees."""

    @classmethod
    def load(cls, spec: EngineSpec) -> InstantOnGpus:
        engine = cls()
        # The other workers' engines have their share of the rows.
        time.sleep(1.0)
        engine.stats.notes.append(f"{spec.gpus} GPUs: {os.environ.get('CUDA_VISIBLE_DEVICES')}")
        return engine

    def generate(self, requests: Iterator[Request | None]) -> Iterator[Completion]:
        for completion in super().generate(requests):
            time.sleep(0.05)
            yield completion
