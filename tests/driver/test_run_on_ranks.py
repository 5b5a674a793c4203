"""Jobs whose engine has two ranks, by the real command: the answers of one rank, whatever happens to a rank."""

from __future__ import annotations

from pathlib import Path

import psutil
import pyarrow as pa
import pytest
from distributed import Client

import batchrun as library
from batchrun.commands.verify import verify
from jobs import answers, batchrun, load, start_driver, wait_until, write_job

ROWS = 40


def _job(folder: Path, model: Path) -> Path:
    folder.mkdir()
    return write_job(
        folder,
        model,
        rows=ROWS,
        engine={"kind": "paged", "compile": False},
        generation={"max_new_tokens": 48, "temperature": 0},
    )


def _ranks(pid: int) -> list[psutil.Process]:
    found = psutil.Process(pid).children(recursive=True)
    return [one for one in found if one.is_running() and "batchrun.engine.rank" in one.cmdline()]


def _answers(job: Path) -> pa.Table:
    return answers(job.parent / "out").select(["text", "answer"])


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path, cluster: Client) -> pa.Table:
    """What one rank writes."""
    job = _job(tmp_path_factory.mktemp("alone") / "job", tiny_llama)
    result = library.run(load(job, "model.dtype=float32"), client=cluster)
    assert not any("processes on the CPU" in note for one in result.engines for note in one.notes)
    found = _answers(job)
    assert found.num_rows == ROWS
    return found


def test_two_ranks_write_what_one_writes(tmp_path: Path, tiny_llama: Path, alone: pa.Table) -> None:
    job = _job(tmp_path / "job", tiny_llama)
    code, out, err = batchrun("run", str(job), "--set", "model.dtype=float32", "--set", "engine.gpus=2")
    assert code == 0, err
    assert "are 2 processes on the CPU here" in " ".join(out.split())
    assert _answers(job).equals(alone)


def test_a_rank_that_is_killed_during_a_run_costs_no_row(
    tmp_path: Path, tiny_llama: Path, alone: pa.Table
) -> None:
    job = _job(tmp_path / "job", tiny_llama)
    words = ("--set", "model.dtype=float32", "--set", "engine.gpus=2", "--set", "engine.max_rows=4")
    process = start_driver("run", str(job), *words, "--set", "output.flush_seconds=0.2")
    output = job.parent / "out"
    wait_until(lambda: any(output.glob("_job/stage/*/*.chunk")), process)
    (rank,) = _ranks(process.pid)
    rank.kill()
    _, err = process.communicate(timeout=240)
    assert process.returncode == 0, err
    assert not rank.is_running()
    assert _answers(job).equals(alone)
    assert verify(load(job)).found.passed
