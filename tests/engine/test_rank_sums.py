"""What ranks add up, each in a process of its own, on a CPU: over gloo and, in Triton's interpreter, over files as each
other's memory."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("triton")

from summing_rank import run_ranks


def test_sums_of_three_ranks_are_right_and_the_same_bits_on_each(tmp_path: Path) -> None:
    run_ranks(3, tmp_path, "cpu")
