"""What ranks add up, each in a process of its own: on a CPU over gloo and, in Triton's interpreter, over files as each
other's memory; on GPUs over NCCL and NVLink."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "support" / "summing_rank.py"


def _run(ranks: int, folder: Path, device: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), str(rank), str(ranks), str(folder), device],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(said)


def test_sums_of_three_ranks_are_right_and_the_same_bits_on_each(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    _run(3, tmp_path, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that read each other's memory")
def test_sums_of_two_gpus_are_right_captured_and_the_same_bits_on_each(tmp_path: Path) -> None:
    _run(2, tmp_path, "cuda")
