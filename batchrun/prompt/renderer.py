"""Templates rendered in a process of their own, so that none of them ever holds up or bloats a worker."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from batchrun.errors import BatchrunError, FaultCode, RowFault

# Rows sent at once: few enough that large documents fit the renderer's memory, many enough to hide the round trip.
CHUNK_ROWS = 128
END_SECONDS = 5.0
KILLED = "rendering was killed, for memory perhaps"
# As often a row has to be alone in a process that is killed before it is blamed, and compiling before it is given up.
KILLS = 3


def killed() -> BatchrunError:
    """The error where the process is killed whatever it is given: nothing says that a template is to blame."""
    return BatchrunError(
        f"the process that renders templates was killed {KILLS} times in a row",
        "prompt",
        "if the machine or its container is out of memory, free some, then run the same command again",
    )


class Renderer:
    """One process, started on first use, and again after a row ended it. Any number of threads may use it.

    `answers` counts what came of it, deaths included: it grows every few seconds as long as rows are rendered.
    """

    def __init__(self) -> None:
        self.answers = 0
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def compile_errors(self, sources: Sequence[str]) -> list[str | None]:
        """(templates,) What is wrong with each template, if anything. Raises as `killed` says."""
        answer = self._insist("compile", sources)
        if answer == KILLED:
            raise killed()
        # One of them, and nobody knows which, was so dear that the process ended.
        return [answer] * len(sources) if isinstance(answer, str) else answer

    def rows(
        self, sources: Sequence[str], names: Sequence[str], rows: Sequence[tuple[Any, ...]]
    ) -> list[list[str] | RowFault]:
        """(rows,) The texts of the templates over a row's values of the columns `names`, or the row's fault."""
        return self._each("rows", (sources, names), rows)

    def chats(
        self, template: str, variables: Mapping[str, Any], rows: Sequence[tuple[Any, Any]]
    ) -> list[str | RowFault]:
        """(rows,) Conversations, (messages, tools or None) each, through a chat template as transformers renders it, up
        to where the model is to go on, or the row's fault."""
        return self._each("chats", (template, variables), rows)

    def _each(self, kind: str, what: tuple[Any, ...], rows: Sequence[Any]) -> list[Any]:
        found: list[Any] = []
        while len(found) < len(rows):
            chunk = rows[len(found) : len(found) + CHUNK_ROWS]
            answer = self._ask(kind, *what, chunk) if len(chunk) > 1 else None
            if not isinstance(answer, list):
                answer = [self._alone(kind, what, row) for row in chunk]
            found += answer
        return found

    def _alone(self, kind: str, what: tuple[Any, ...], row: Any) -> Any:
        """The row by itself, as after the process ended on it and others: one that ends it then is at fault."""
        answer = self._insist(kind, *what, [row])
        return RowFault(FaultCode.TEMPLATE_ERROR, answer) if isinstance(answer, str) else answer[0]

    def _insist(self, kind: str, *arguments: Any) -> Any:
        """The process's answer, or what it died of. What kills it from outside may mean something else."""
        for _ in range(KILLS):
            answer = self._ask(kind, *arguments)
            if answer != KILLED:
                break
        return answer

    def _ask(self, kind: str, *arguments: Any) -> Any:
        """The process's answer, or what it died of."""
        with self._lock:
            if self._connection is None:
                self._start()
            assert self._connection is not None
            try:
                self._connection.send((kind, arguments))
                return self._connection.recv()
            except (EOFError, OSError):
                return self._death()
            finally:
                self.answers += 1

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs, _out_of_a_terminals_reach():
            # Not multiprocessing: a Dask worker may be daemonic, and its children would import the user's __main__.
            self._process = subprocess.Popen(
                [sys.executable, "-m", "batchrun.prompt.render_server", str(theirs.fileno())],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)},
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )
        self._connection = Connection(ours.detach())

    def _death(self) -> str:
        assert self._process is not None
        assert self._connection is not None
        self._connection.close()
        self._connection = None
        self._process.kill()
        status = self._process.wait(END_SECONDS)
        if status == -signal.SIGPROF:
            return "rendering takes too much CPU time"
        return KILLED if status == -signal.SIGKILL else f"rendering ended its process (status {status})"


@contextmanager
def _out_of_a_terminals_reach() -> Iterator[None]:
    """A process that starts inside never hears Ctrl-C or that its terminal was closed, not even before it can ignore
    them: Python would print a traceback then."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


RENDERER = Renderer()
