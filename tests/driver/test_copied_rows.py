"""Rows with the same prompt in a whole run: generated once, whichever partitions they are in."""

from __future__ import annotations

import batchrun as library
from batchrun.report import summary
from batchrun.telemetry import record
from jobs import answers, load, write_job

ROWS, DISTINCT = 400, 40
JOB = {
    "prompt": {"template": "prompt {{ place.x % 40 }}"},
    "engine": {"kind": "batchrun.engine.instant:InstantEngine"},
    "output": {"rows_per_part": 50, "flush_rows": 2048},
    "cluster": {"workers": 1},
}


def check(path, counts):
    table = answers(path)
    texts = [f"prompt {i % DISTINCT}" for i in range(ROWS)]
    assert table["answer"].to_pylist() == texts
    assert table["place"].to_pylist() == [{"x": i, "y": None} for i in range(ROWS)]
    assert counts.rows == ROWS
    assert counts.requests + counts.copied == ROWS
    tokens = sum(table["prompt_tokens"].to_pylist()) + sum(table["output_tokens"].to_pylist())
    assert counts.tokens + counts.copied_tokens == tokens


def test_each_prompt_reaches_a_workers_engine_about_once_over_all_partitions(tmp_path, tiny_llama, capsys):
    job = load(write_job(tmp_path, tiny_llama, rows=ROWS, row_group=50, **JOB))
    result = library.run(job)
    check(tmp_path / "out", result.counts)
    assert result.requests <= 1.05 * DISTINCT
    told = "\n".join(summary.run_lines(result))
    assert (
        f"{result.requests} rows done, {ROWS - result.requests} copied from rows with the same prompt" in told
    )
    run = record.read_all(result.folder)[-1]
    assert run.counts.copied == ROWS - result.requests
    assert "copied rows" in (tmp_path / "out/_job/report.html").read_text()


def test_it_can_be_turned_off(tmp_path, tiny_llama):
    path = write_job(tmp_path, tiny_llama, rows=ROWS, row_group=50, generation={"deduplicate": False}, **JOB)
    result = library.run(load(path))
    check(tmp_path / "out", result.counts)
    assert result.requests == ROWS
