"""Jobs whose rows are put in order: what a row is called, staged, answered and charged does not depend on it."""

from __future__ import annotations

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

import batchrun as library
from batchrun.commands.status import status
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError, ExitCode
from jobs import answers, load, write_job

ROWS = 120


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> Path:
    """Questions about 4 documents in random order; every 20th one is too long."""
    source = {"path": "in.parquet", "order": "prefix"}
    output = {
        "path": "out", "rows_per_part": 35, "flush_rows": 4, "flush_seconds": 0.3,
        "failed": "failed", "row_column": "source",
    }  # fmt: skip
    prompt = {"template": "{{ doc }}: {{ text }}", "max_bytes": 60}
    path = write_job(
        tmp_path, tiny_llama, input=source, output=output, prompt=prompt, limits={"max_error_rate": 1.0}
    )
    chance = random.Random(0)
    docs = [chance.choice("abcd") * 20 for _ in range(ROWS)]
    texts = [f"question {i}" + (" too long" * 5 if i % 20 == 7 else "") for i in range(ROWS)]
    table = pa.table({"text": texts, "doc": docs})
    pq.write_table(table, tmp_path / "in.parquet", row_group_size=25)
    return path


def input_of(job: Path) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = pq.read_table(job.parent / "in.parquet").to_pylist()
    return rows


@pytest.mark.timeout(200)
def test_rows_in_order_keep_their_names_through_failing_and_retrying(job, cluster):
    result = library.run(load(job), client=cluster)
    assert (result.exit_code, result.rows, result.failed) == (ExitCode.FAILED_ROWS, ROWS, 6)
    table, given = answers(job.parent / "out"), input_of(job)
    rows = [int(name.removeprefix("in.parquet:")) for name in table["source"].to_pylist()]
    assert sorted(rows) == list(range(ROWS))
    assert table.select(["text", "doc"]).to_pylist() == [given[row] for row in rows]
    wrong = [row for row, status in zip(rows, table["status"].to_pylist(), strict=True) if status == "failed"]
    assert sorted(wrong) == list(range(7, ROWS, 20))
    for row, answer in zip(rows, table["answer"].to_pylist(), strict=True):
        if row not in wrong:
            assert answer == "{doc}: {text}".format(**given[row]), "an echo"
    docs = [given[row]["doc"] for row in rows]
    assert len([1 for a, b in zip(docs, [*docs[1:], None], strict=True) if a != b]) <= 4 + 3
    failed = pq.read_table(job.parent / "out/failed")
    places = zip(failed["source_row_group"].to_pylist(), failed["source_row"].to_pylist(), strict=True)
    assert sorted(25 * group + row for group, row in places) == sorted(wrong)
    assert "in.parquet:" in str(status(load(job)).lines())
    assert verify(load(job)).found.passed
    report = (job.parent / "out/_job/report.html").read_text()
    assert "question 7 too long" in report
    assert library.run(load(job), client=cluster).requests == 0
    fixed = load(job, "prompt.max_bytes=1000")
    again = library.retry(fixed, client=cluster)
    assert (again.exit_code, again.requests) == (ExitCode.COMPLETE, 6)
    after = answers(job.parent / "out")
    assert after["source"].equals(table["source"])
    assert after["answer"].to_pylist() == ["{doc}: {text}".format(**given[row])[:64] for row in rows], (
        "an echo of at most 64 tokens"
    )
    assert verify(fixed).found.passed


def test_a_run_that_goes_on_takes_the_order_from_its_output(job, cluster, monkeypatch):
    library.run(load(job), client=cluster)
    (job.parent / "out/_job/manifest.json").unlink()
    next((job.parent / "out/data").iterdir()).unlink()
    # Another version might sketch otherwise.
    monkeypatch.delattr("batchrun.dataset.planner.ordered")
    result = library.run(load(job), client=cluster)
    assert (result.rows, result.exit_code) == (ROWS, ExitCode.FAILED_ROWS)
    assert 0 < result.requests <= 35
    assert verify(load(job)).found.passed


def test_the_order_is_part_of_what_an_output_is_made_of(job, cluster):
    library.run(load(job), client=cluster)
    with pytest.raises(ChangedError, match=r"input\.order: prefix -> null"):
        library.run(load(job, "input.order=null"), client=cluster)
    with pytest.raises(ChangedError, match=r"prompt\.template"):
        library.run(load(job, "prompt.template={{ text }}"), client=cluster)
