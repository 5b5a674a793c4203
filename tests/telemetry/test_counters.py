"""One type counts, and every place that shows a number of a run shows the same one."""

from __future__ import annotations

import json
from dataclasses import asdict
from html.parser import HTMLParser
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

import batchrun as library
from batchrun.commands.status import status
from batchrun.counters import SUMS, Counters
from batchrun.engine.protocol import EngineStats
from batchrun.errors import ModelError
from batchrun.output import document
from batchrun.output.chunk import ANSWERS
from batchrun.report.page import Facts, render
from batchrun.report.result import RunResult
from batchrun.report.summary import run_lines
from batchrun.storage import Folder
from batchrun.telemetry import record
from jobs import ROWS_OF_JOB as ROWS
from jobs import answers, load, write_job

# What version 0.2 wrote, less some of the job and the samples.
OLD_RECORD = {
    "attention": "sdpa", "batches": 8, "busy_seconds": 30.0, "computed_tokens": 1000, "device": "cpu",
    "dtype": "float32", "engine": "padded", "errors": {"NULL_PROMPT": 2},
    "examples": ["partition 0, row 3: NULL_PROMPT: null"],
    "failed": 2, "job": {"input": {"path": "in.parquet"}}, "job_hash": "x", "load_seconds": 5.0,
    "machine": {"cores": 2}, "message": "", "model": "m", "model_fingerprint": "f", "notes": [],
    "outcome": "complete", "output_tokens": 400,
    "partitions": 2, "plan_rows": 40, "price_per_gpu_hour": 2.0, "prompt_tokens": 500, "real_tokens": 900,
    "requests": 36, "reused": 2, "rows": 38, "run": "a" * 32, "samples": {"seconds": [1.0], "rows": [38]},
    "seconds": 45.0, "slowest": [{"partition": 0, "rows": 20, "seconds": 9.0, "tokens": 300, "worker": "w"}],
    "started": "2026-01-31T02:00:00Z", "versions": {"batchrun": "0.2.0"}, "worker_seconds": 40.0, "workers": 1,
}  # fmt: skip


class Text(HTMLParser):
    def __init__(self, html: str) -> None:
        super().__init__()
        self.words: list[str] = []
        self.feed(html)

    def handle_data(self, data: str) -> None:
        self.words += data.split()


def rows_of(folder: Path) -> dict[str, object]:
    """What the parts themselves hold, counted by hand."""
    table = answers(folder / "out")
    ok = table.filter(pc.equal(table["status"], "ok"))
    failed = table.filter(pc.equal(table["status"], "failed"))
    return {
        "rows": table.num_rows,
        "failed": failed.num_rows,
        "empty": sum(not text.strip() for text in ok["answer"].to_pylist()),
        "prompt_tokens": sum(table["prompt_tokens"].to_pylist()),
        "output_tokens": sum(table["output_tokens"].to_pylist()),
        "finish_reasons": {
            v["values"]: v["counts"] for v in pc.value_counts(table["finish_reason"]).to_pylist()
        },
        "errors": {"TEMPLATE_ERROR": failed.num_rows},
    }


def test_every_number_is_the_same_in_terminal_record_page_status_result_and_parts(
    tmp_path, tiny_llama, cluster
):
    job = load(
        write_job(
            tmp_path, tiny_llama,
            prompt={"template": "{{ text }}{% if id is none %}{{ none.x.y }}{% endif %}"},
            limits={"max_error_rate": 1.0}, cluster={"price_per_gpu_hour": 3.0},
        )
    )  # fmt: skip
    result = library.run(job, client=cluster)
    counted = rows_of(tmp_path)
    assert counted["failed"]
    whole = {name: getattr(result, name) for name in counted}
    assert whole == counted
    (run,) = record.read_all(Folder(str(tmp_path / "out")))
    (shown,) = status(job).to_json()["runs"]
    for counts in (asdict(result.counts), asdict(run.counts), shown, result.to_json()["counts"]):
        assert {name: counts[name] for name in counted} == counted
        assert counts["requests"] == result.requests == ROWS - result.failed
        assert counts["sent_tokens"] == result.prompt_tokens
        assert counts["commits"] == result.parts == 3
    assert {name: run.samples[name][-1] for name in SUMS if name != "commit_seconds"} == {
        name: getattr(run.counts, name) for name in SUMS if name != "commit_seconds"
    }
    found = status(job)
    assert (found.failed, found.errors, found.rows_committed) == (result.failed, result.errors, ROWS)
    assert sum(slow.tokens for slow in run.slowest) == run.counts.tokens
    text, page = "\n".join(run_lines(result)), " ".join(Text(render(Facts.read(job))).words)
    for name in ("prompt_tokens", "output_tokens"):
        assert f"{counted[name]:,}" in text
        assert f"{counted[name]:,}" in page
    engines = result.engines
    assert sum(stats.output_tokens for stats in engines) == counted["output_tokens"]
    assert sum(stats.prompt_tokens for stats in engines) == counted["prompt_tokens"]


@pytest.fixture
def short(tmp_path, tiny_llama, cluster) -> RunResult:
    """40 rows: over before the second heartbeat."""
    return library.run(write_job(tmp_path, tiny_llama, rows=40), client=cluster)


def test_a_run_that_is_over_in_a_moment_tells_its_tokens(short):
    assert short.output_tokens > 0
    assert f"{short.output_tokens:,} out" in "\n".join(run_lines(short))


def test_a_late_heartbeat_never_replaces_what_a_receipt_told():
    early, late = (
        EngineStats(requests=40, pid=7),
        EngineStats(requests=40, completions=40, output_tokens=480, pid=7),
    )
    assert early.is_before(late)
    assert not late.is_before(early)
    assert not late.is_before(late)


def test_a_run_that_is_ended_by_a_fault_records_the_rows_that_it_generated(tmp_path, tiny_llama, cluster):
    job = load(write_job(tmp_path, tiny_llama, engine={"kind": "engines:EndingEngine"}))
    with pytest.raises(ModelError):
        library.run(job, client=cluster)
    found = status(job)
    (run,) = found.runs
    assert run.counts.rows == found.rows_committed + found.rows_staged >= 25, (
        "25 of each engine that was begun"
    )


def test_a_record_of_before_counters_were_one_type_is_read(tmp_path):
    folder = Folder(str(tmp_path))
    folder.put("_job/runs/20260131T020000Z-aaaaaaaa.json", document.encode(OLD_RECORD))
    (run,) = record.read_all(folder)
    counts = run.counts
    assert (counts.rows, counts.failed, counts.reused, counts.requests) == (38, 2, 2, 36)
    assert (counts.prompt_tokens, counts.output_tokens, counts.errors) == (500, 400, {"NULL_PROMPT": 2})
    assert list(counts.examples) == ["partition 0, row 3: NULL_PROMPT: null"]
    assert counts.finish_reasons == {}
    assert run.worker_time == {"loading": 5.0, "generating": 30.0, "idle": 5.0}
    assert run.worker_seconds == 40.0
    assert run.cost == pytest.approx(2.0 * 40 / 3600)
    assert run.key == "_job/runs/20260131T020000Z-aaaaaaaa.json"


def test_a_part_of_before_finish_reasons_were_counted_is_read(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama)
    library.run(job, client=cluster)
    for file in (tmp_path / "out/data").iterdir():
        table = pq.read_table(file)
        own = json.loads(pq.read_metadata(file).metadata[b"batchrun"])
        old = {name: value for name, value in own.items() if name not in ("finish_reasons", "empty")}
        with pq.ParquetWriter(file, table.schema.remove_metadata()) as writer:
            writer.write_table(table.replace_schema_metadata(None))
            writer.add_key_value_metadata({"batchrun": json.dumps(old)})
    (tmp_path / "out/_job/manifest.json").unlink()
    result = library.run(job, client=cluster)
    assert (result.rows, result.requests, result.finish_reasons) == (ROWS, 0, {})
    assert "answers:" not in "\n".join(run_lines(result)), "what nobody counted is not shown"


WORDS = st.sampled_from(["", "  ", "a", "b c"])


@given(st.lists(st.tuples(WORDS, st.booleans(), st.integers(0, 9)), max_size=20), st.integers(0, 20))
def test_counters_add_up_however_rows_are_cut(rows, cut):
    def table(some):
        columns = {
            "row": range(len(some)), "answer": [None if bad else text for text, bad, _ in some],
            "finish_reason": ["error" if bad else "stop" for _, bad, _ in some],
            "prompt_tokens": [count for _, _, count in some], "output_tokens": [count for _, _, count in some],
            "status": ["failed" if bad else "ok" for _, bad, _ in some],
            "error": ["CODE: x" if bad else None for _, bad, _ in some],
        }  # fmt: skip
        return pa.table([pa.array(columns[f.name], f.type) for f in ANSWERS], schema=ANSWERS)

    def counted(*tables):
        counts = Counters()
        for one in tables:
            counts.count(table(one), lambda row: f"row {row}")
        return counts

    whole = counted(rows)
    assert whole.rows == len(rows)
    assert whole.empty == sum(not bad and not text.strip() for text, bad, _ in rows)
    for same in (counted(rows[:cut], rows[cut:]), counted(rows[:cut]) + counted(rows[cut:])):
        assert {**asdict(same), "examples": ()} == {**asdict(whole), "examples": ()}
        assert len(same.examples) == len(whole.examples)


def test_failed_rows_do_not_make_answers_shorter() -> None:
    reasons = {"length": 2, "stop": 1, "error": 7}
    result = RunResult("out", 10, 3, 7, 1, 50, 36, {}, {}, 1.0, finish_reasons=reasons)
    (line,) = (line for line in run_lines(result) if line.startswith("answers: "))
    assert line.startswith("answers: 12 tokens on average, 2 (66.7%) cut")
