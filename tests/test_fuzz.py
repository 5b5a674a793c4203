"""A few hundred damaged inputs at every border; tests/fuzz.py takes as many as there is time for."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import fuzz
import pytest

from jobs import environment

# As many as take a few seconds each.
COUNTS = {"job": 300, "chunk": 1000, "document": 100, "plan": 200, "input": 100, "part": 100}


@pytest.mark.parametrize("target", fuzz.TARGETS)
def test_damage_is_refused_or_changes_nothing(target: str) -> None:
    program = [sys.executable, str(Path(fuzz.__file__)), "--target", target, "--count", str(COUNTS[target])]
    done = subprocess.run(program, env=environment(), capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "'refused': " in done.stdout
