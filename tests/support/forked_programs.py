"""Engines' processes that are forked off the tests' own, or off their worker: they need not import torch again, which
takes most of a short test.

What they do from their start on is the same. That they can be started as programs, every run of a job holds, and
tests/driver/test_run_on_ranks.py of ranks.
"""

from __future__ import annotations

import faulthandler
import importlib
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from batchrun.engine.choose import preload

if TYPE_CHECKING:
    import pytest

_popen = subprocess.Popen
PROGRAMS = {"batchrun.engine.server", "batchrun.engine.rank", "faulty_rank"}


class ForkedProgram:
    """`subprocess.Popen` of `python -m PROGRAM ...`, as far as an engine's parents call it."""

    def __init__(
        self,
        words: list[str],
        env: Mapping[str, str],
        pass_fds: list[int],
        stdout: int | None = None,
        **_: Any,
    ) -> None:
        self._status: int | None = None
        ours, theirs = os.pipe() if stdout == subprocess.PIPE else (None, None)
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                _become(words[2:], env, pass_fds, theirs)
                importlib.import_module(words[2]).main()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        self.stdout = None
        if ours is not None and theirs is not None:
            os.close(theirs)
            self.stdout = os.fdopen(ours, "rb")

    def kill(self) -> None:
        if self._status is None:
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> int:
        deadline = time.monotonic() + timeout if timeout is not None else None
        while self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
            elif deadline is not None and time.monotonic() > deadline:
                raise subprocess.TimeoutExpired("a program", timeout or 0)
            else:
                time.sleep(0.01)
        return self._status


def _become(words: list[str], env: Mapping[str, str], pass_fds: list[int], output: int | None) -> None:
    """Leaves this process what a program that was started would have."""
    faulthandler.disable()
    if output is not None:
        os.dup2(output, 1)
        os.dup2(output, 2)
    # Nobody's end of a socket is kept open. Its number stays taken: objects of the tests that end here close it.
    null = os.open(os.devnull, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        # The folder itself was one of them.
        if number not in (0, 1, 2, null, *pass_fds) and os.path.exists(f"/proc/self/fd/{number}"):
            os.dup2(null, number, inheritable=False)
    for name, number in (("stdout", 1), ("stderr", 2)):
        setattr(sys, name, open(number, "w", buffering=1, closefd=False))  # noqa: SIM115
    sys.argv = words
    os.environ.clear()
    os.environ.update(env)


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, until the test or the fixture has ended."""
    monkeypatch.setattr(subprocess, "Popen", _start)


def use_in_worker() -> None:
    """In a Dask worker, for the rest of its life. Transformers must not be imported yet: it would be without torch."""
    assert "transformers" not in sys.modules
    preload("padded")
    preload("paged")
    subprocess.Popen = _start  # type: ignore[misc, assignment]


def _start(words: Any, **options: Any) -> Any:
    is_engine = isinstance(words, list) and words[1:2] == ["-m"] and words[2] in PROGRAMS
    return ForkedProgram(words, **options) if is_engine else _popen(words, **options)
