"""No kernel of a run reads or writes outside of its memory, by compute-sanitizer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from jobs import environment

pytestmark = pytest.mark.gpu
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"


def test_memcheck_finds_nothing() -> None:
    script = Path(__file__).with_name("memcheck.py")
    command = [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, str(script)]
    env = environment(OMP_NUM_THREADS="4")
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=280)
    print(done.stdout[-1500:])
    assert done.returncode == 0, (done.stdout[-3000:], done.stderr[-2000:])
    assert "ERROR SUMMARY: 0 errors" in done.stdout + done.stderr
