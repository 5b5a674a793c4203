"""A whole `batchrun run` on a GPU: killed, run again, verified, and held against a run in one piece."""

from __future__ import annotations

import json
import os
import signal
import time
import uuid
from pathlib import Path

import numpy as np
import pytest
import real_rows
import yaml

import jobs

pytestmark = pytest.mark.gpu
ROWS = 6_000
# In the environment of every process of these runs.
RUN = uuid.uuid4().hex


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("run")
    real_rows.model_folder(real_rows.LARGE, made / "model")
    real_rows.write_rows(made / "rows.parquet", ROWS)
    return made


def _job(folder: Path, output: str) -> Path:
    path = folder / f"{output}.yaml"
    job = {
        "input": {"path": "rows.parquet"},
        "prompt": {"template": "Describe: {{ text }}", "truncate": "right"},
        "model": {"name": "model"},
        "generation": {"max_new_tokens": 32},
        "engine": {"kind": "paged", "cache_tokens": 150_000},
        "output": {"path": output, "rows_per_part": 1024, "flush_seconds": 2},
    }
    path.write_text(yaml.safe_dump(job))
    return path


def _batchrun(*words: str) -> str:
    """What the command says. It and all that it starts are programs: one that was forked could not use the GPU."""
    process = jobs.start_program(*words, **{jobs.RUN: RUN})
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0, (out[-2000:], err[-2000:])
    return out


def _run(path: Path) -> float:
    started = time.monotonic()
    _batchrun("run", str(path), "--json")
    return time.monotonic() - started


def test_a_run_that_is_killed_and_run_again_answers_every_row_once_as_a_run_in_one_piece(
    folder: Path,
) -> None:
    whole, killed = _job(folder, "whole"), _job(folder, "killed")
    print(f"{ROWS} rows in one piece: {_run(whole):.1f} s")
    process = jobs.start_program("run", str(killed), **{jobs.RUN: RUN})
    jobs.wait_until(lambda: list((folder / "killed/data").glob("*.parquet")), process, seconds=120)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    print(f"killed and run again: {_run(killed):.1f} s")
    for path in (whole, killed):
        _batchrun("verify", str(path), "--json")
    first, second = jobs.answers(folder / "whole"), jobs.answers(folder / "killed")
    assert first["id"].to_pylist() == second["id"].to_pylist() == list(range(ROWS))
    assert set(second["status"].to_pylist()) == {"ok"}
    assert set(second["output_tokens"].to_pylist()) == {32}
    same = np.mean(np.array(first["answer"].to_pylist()) == np.array(second["answer"].to_pylist()))
    print(f"{same:.1%} of the answers are the same")
    # Other batches round differently, and after a near tie a row goes on otherwise.
    assert same > 0.9


def test_a_bench_of_the_jobs_rows_answers_them_all(folder: Path) -> None:
    assert json.loads(_batchrun("bench", str(_job(folder, "whole")), "--rows", "3000", "--json"))


def test_no_engine_outlives_its_run() -> None:
    # Those of other runs on this machine are none of ours.
    assert not jobs.engines_of(RUN)
