"""Processes of engines end with whoever started them, whatever moment they are in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

# What Python runs first of all, in every process: those of engines are paused there, as by SIGSTOP from outside.
PAUSES = """
import os, signal
if b"-m\\0batchrun.engine." in open("/proc/self/cmdline", "rb").read():
    os.kill(os.getpid(), signal.SIGSTOP)
"""
PARENTS = {
    "engine": """
import socket, time
from batchrun.engine.processes.launch import start
ours, theirs = socket.socketpair()
print(start(theirs.fileno(), {}).pid, flush=True)
time.sleep(60)
""",
    "rank": """
import os, socket, sys, time
from types import SimpleNamespace
from batchrun.engine.paged.parallel.ranks import _Rank
meeting, _ = socket.socketpair()
member = SimpleNamespace(rank=1, spec=SimpleNamespace(gpus=2))
_Rank.send = lambda *_: None
print(_Rank(None, member, meeting.fileno())._process.pid, flush=True)
time.sleep(60)
""",
}


def _state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return "gone"


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's own")
@pytest.mark.parametrize("kind", PARENTS)
def test_one_that_is_paused_before_it_runs_a_line_ends_with_its_parent(kind: str, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(PAUSES)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENTS[kind]],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        deadline = time.monotonic() + 30
        while _state(child) != "T":
            assert time.monotonic() < deadline, _state(child)
            time.sleep(0.02)
    finally:
        parent.kill()
        parent.wait()
    deadline = time.monotonic() + 10
    try:
        while _state(child) not in ("gone", "Z", "X"):
            assert time.monotonic() < deadline, "it is left behind"
            time.sleep(0.02)
    finally:
        if _state(child) == "T":
            os.kill(child, signal.SIGKILL)
