"""A storm of faults over real runs, in short; `python -m tests.chaos --minutes 60` is the long one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

from chaos.schedule import EVENTS, REQUEST_FAULTS, events, verdict
from jobs import environment

FAULTS = 80
ROOT = Path(__file__).parents[2]


@pytest.mark.timeout(900)
def test_a_storm_of_faults_leaves_an_exact_output_and_few_rows_generated_twice(tmp_path):
    seed = os.environ.get("BATCHRUN_TEST_SEED", "7")
    print(f"BATCHRUN_TEST_SEED={seed}")
    words = [sys.executable, "-m", "tests.chaos", "--seed", seed, "--minutes", "0.1", "--keep", str(tmp_path)]
    done = subprocess.run(words, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=880)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["faults_in_all"] >= FAULTS
    assert found["rows"] <= found["requests"] <= found["allowed"]


def test_the_same_seed_gives_the_same_faults():
    kinds = [*EVENTS, *REQUEST_FAULTS]

    def schedule(seed: str, only: list[str]) -> list[object]:
        requests = [verdict(seed, number, only) for number in range(500)]
        return [*islice(events(seed, only), 50), *(v for v in requests if v.fault)]

    assert schedule("7-0", kinds) == schedule("7-0", kinds)
    assert schedule("7-0", kinds) != schedule("7-1", kinds)
    few = schedule("7-0", ["worker-kill", "lost"])
    kept = [one for one in schedule("7-0", kinds) if getattr(one, "fault", None) == "lost"]
    assert [one for one in few if getattr(one, "fault", None)] == kept, "fewer kinds, at the same places"
