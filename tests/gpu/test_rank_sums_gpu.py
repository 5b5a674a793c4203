"""What two GPUs add up, each in a process of its own, over NCCL and each other's memory. Run by hand: -m gpu."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

from summing_rank import run_ranks


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs that read each other's memory")
def test_sums_of_two_gpus_are_right_captured_and_the_same_bits_on_each(tmp_path: Path) -> None:
    run_ranks(2, tmp_path, "cuda")
