"""When finished rows are staged, whatever the pace at which an engine finishes them."""

from __future__ import annotations

import threading
import time

import pytest

import batchrun as library
from batchrun.errors import Interrupted
from batchrun.telemetry.progress import Progress
from jobs import check_complete, load, write_job

ROWS = 40


def test_rows_that_finish_one_by_one_are_staged_in_time_and_a_stop_is_heeded(tmp_path, tiny_llama, cluster):
    """A completion every 0.2 s: never a pause long enough to be idle, never a batch large enough to be full."""
    job = write_job(
        tmp_path, tiny_llama, rows=ROWS, row_group=ROWS,
        engine={"kind": "engines:SecondsEngine"},
        output={"rows_per_part": ROWS, "flush_rows": 1000, "flush_seconds": 1.0},
    )  # fmt: skip
    stop = threading.Event()
    staged_at: list[float] = []

    def on_progress(progress: Progress) -> None:
        if not staged_at and list((tmp_path / "out").rglob("*.chunk")):
            staged_at.append(time.monotonic())
            stop.set()

    with pytest.raises(Interrupted):
        library.run(job, client=cluster, stop=stop, on_progress=on_progress)
    stopped = time.monotonic() - staged_at[0]
    assert stopped < 5.0, f"{stopped:.1f} s until the stop was heeded"
    result = library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    assert 0 < result.reused < ROWS
    assert result.requests + result.reused == ROWS
    check_complete(tmp_path / "out", ROWS)
