"""A few kills and stops of real runs; `python -m tests.chaos.kills --kills 200 --signals 40` is the long run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from chaos.strikes import strikes
from jobs import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_kills_and_stops_at_any_moment_leave_what_the_documentation_promises(tmp_path):
    seed = os.environ.get("BATCHRUN_TEST_SEED", "11")
    print(f"BATCHRUN_TEST_SEED={seed}")
    words = ["--seed", seed, "--strikes", "4", "--kills", "2", "--signals", "1", "--rows", "600"]
    words += ["--keep", str(tmp_path / "kept")]
    # The promise is 5 s; a machine that runs tests is busy with others.
    words += ["--stop-seconds", "15"]
    done = subprocess.run(
        [sys.executable, "-m", "tests.chaos.kills", *words],
        cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=880,
    )  # fmt: skip
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["kills_in_all"] >= 2
    assert found["signals_in_all"] >= 1


def test_the_same_seed_gives_the_same_strikes():
    assert list(strikes("7-0")) == list(strikes("7-0"))
    assert list(strikes("7-0")) != list(strikes("7-1"))
