"""Ranks that are forked off the tests' own process: they need not import torch again, which takes most of a short test.

What a rank does from its start on is the same; that it can be started as a program, others hold.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from batchrun.engine import rank
from batchrun.engine.paged.parallel import ranks


class ForkedRank:
    """`subprocess.Popen`, as far as `Ranks` calls it."""

    def __init__(self, words: list[str], pass_fds: list[int], **_: Any) -> None:
        self._status: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for name in os.listdir("/proc/self/fd"):
                    # As a program would have them: another's end of a socket would keep it open.
                    if int(name) > 2 and int(name) not in pass_fds:
                        with contextlib.suppress(OSError):
                            os.close(int(name))
                sys.argv = words[2:]
                rank.main()
            finally:
                os._exit(1)

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
                raise subprocess.TimeoutExpired("a rank", timeout or 0)
            else:
                time.sleep(0.01)
        return self._status


def use(monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on, in this test."""
    monkeypatch.setattr(ranks.subprocess, "Popen", ForkedRank)
