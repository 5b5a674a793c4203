"""A run tells of itself truthfully: its record, its page, its status, from the store alone."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from parts import faulty_folder

import batchrun as library
from batchrun.commands.status import status
from batchrun.counters import Counters
from batchrun.driver import recorder as observe
from batchrun.driver.prepare import prepare
from batchrun.errors import StorageError
from batchrun.output import document
from batchrun.report import bill, charts, plots
from batchrun.report.answers import Look
from batchrun.report.page import Facts, render
from batchrun.storage import Folder
from batchrun.telemetry import record
from batchrun.telemetry.milestones import Milestones
from batchrun.telemetry.progress import silent
from batchrun.telemetry.record import REPORT, RunRecord, SlowPartition, Timeline
from batchrun.telemetry.redact import Redactor
from jobs import ROWS_OF_JOB as ROWS
from jobs import batchrun, load, start, wait_until, write_job

PLANTED = "<script>alert('row')</script>"


class Page(HTMLParser):
    """The tags, the visible text and everything that a page would fetch."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [
            v for k, v in attrs if k in ("src", "srcset", "data") or (k == "href" and tag != "use")
        ]

    def handle_data(self, data):
        self.text += data


def planted_rows(rows: int) -> pa.Table:
    texts = [PLANTED if i == 0 else f"row {i} " + "x" * (i % 40) for i in range(rows)]
    return pa.table({"text": texts, "id": [None if i % 5 == 4 else i for i in range(rows)]})


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, cluster) -> Path:
    """A complete output with failed rows, planted markup in a row, in an error and in the job, and a price."""
    folder = tmp_path_factory.mktemp("report")
    job = write_job(
        folder, tiny_llama,
        prompt={"template": "{{ text }}{% if id is none %}{{ ['" + PLANTED.replace("'", '"') + "'].x }}{% endif %}"},
        cluster={"price_per_gpu_hour": 3.0}, limits={"max_error_rate": 1.0},
        input={"columns": ["text", "id"]},
    )  # fmt: skip
    pq.write_table(planted_rows(ROWS), folder / "in.parquet", row_group_size=10)
    library.run(job, client=cluster)
    return folder


def test_a_run_leaves_its_record_with_what_it_generated_and_on_what(finished):
    (run,) = record.read_all(Folder(str(finished / "out")))
    manifest = json.loads((finished / "out/_job/manifest.json").read_text())
    assert (run.outcome, run.counts.rows, run.counts.failed, run.plan_rows) == (
        "complete",
        ROWS,
        ROWS // 5,
        ROWS,
    )
    assert (run.counts.prompt_tokens, run.counts.output_tokens) == (
        manifest["prompt_tokens"],
        manifest["output_tokens"],
    )
    assert run.counts.errors == manifest["errors"] == {"TEMPLATE_ERROR": ROWS // 5}
    assert (run.engine, run.workers, run.counts.requests) == ("echo", 1, ROWS - ROWS // 5)
    assert run.versions["torch"]
    assert 0 < run.worker_seconds <= run.seconds + 0.1  # of two clocks
    assert run.cost == pytest.approx(3.0 * run.worker_seconds / 3600)
    assert {slow.partition for slow in run.slowest} == {0, 1, 2}
    assert sum(slow.rows for slow in run.slowest) == ROWS
    assert run.samples["rows_done"][-1] == ROWS
    assert len({len(values) for values in run.samples.values()}) == 1


def test_the_page_of_a_run_shows_totals_errors_plots_and_rows_and_fetches_nothing(finished):
    html = (finished / "out" / REPORT).read_text()
    page = Page(html)
    assert len(html) < 2_000_000
    assert page.fetched == []
    assert "script" not in page.tags, "markup from rows, errors and the job is inert"
    assert page.text.count(PLANTED) >= 2, "and shown as it is: in the prompt and in its answer"
    assert page.tags.count("svg") >= 2  # more after seconds of running
    for expected in (
        "complete with failed rows",
        "TEMPLATE_ERROR",
        "per million tokens",
        "per 1,000 rows",
        # On a CPU, too.
        "workers were",
        "loading",
        "idle",
        "length: cut at generation.max_new_tokens",
        "3.00 per worker and hour",
        "Failed rows",
        "row 1 x",
        "echo",
        "Slowest",
    ):
        assert expected in page.text, expected
    assert "@import" not in html
    assert "url(http" not in html


def test_the_report_command_writes_the_same_page_from_the_store_alone(finished, tmp_path):
    (finished / "in.parquet").rename(finished / "gone.parquet")
    try:
        code, out, err = batchrun("report", str(finished / "job.yaml"), "--out", str(tmp_path / "page.html"))
    finally:
        (finished / "gone.parquet").rename(finished / "in.parquet")
    assert (code, out) == (0, f"report: {tmp_path / 'page.html'}\n"), err
    stored = Page((finished / "out" / REPORT).read_text())
    assert Page((tmp_path / "page.html").read_text()).text == stored.text


def test_an_interrupted_run_leaves_a_record_a_page_and_a_status_of_what_is_known(
    tmp_path, tiny_llama, cluster
):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    process = start("run", str(job), "--log-format", "json")
    wait_until(lambda: list((tmp_path / "out").rglob("*.chunk")), process)
    assert status(load(job)).driver, "the lease's holder"
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate(timeout=90)
    assert process.returncode == 4, err
    events = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert {"event": "end", "exit_code": 4}.items() <= events[-1].items()
    assert any(event.get("event") == "progress" and event["rows"] == ROWS for event in events)
    found = status(load(job))
    assert [run.outcome for run in found.runs] == ["interrupted"]
    assert found.driver is None
    assert not found.complete
    durable = found.rows_committed + found.rows_staged
    assert 0 < durable < ROWS
    assert "interrupted" in Page((tmp_path / "out" / REPORT).read_text()).text
    result = library.run(load(job, "engine.kind=engines:EchoEngine"), client=cluster)
    assert result.requests == ROWS - durable, (
        "what status calls staged is what the next run does not generate"
    )
    assert [run.outcome for run in status(load(job)).runs] == ["interrupted", "complete"]


def test_a_killed_run_is_called_killed_and_its_staged_rows_are_counted(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"})
    process = start("run", str(job))
    wait_until(lambda: list((tmp_path / "out").rglob("*.chunk")), process)
    folder = Folder(str(tmp_path / "out"))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    record.write(
        folder,
        RunRecord("a" * 32, record.now(), "running", 3.0, counts=Counters(errors={"NULL_PROMPT": 2})),
        Redactor(),
    )
    found = status(load(job))
    assert {run.outcome for run in found.runs} == {"killed"}
    assert found.errors == {"NULL_PROMPT": 2}
    assert found.driver is None
    assert found.rows_staged > 0
    assert "killed" in render(Facts.read(load(job)))


def test_a_damaged_record_is_left_aside_and_a_newer_one_is_read(tmp_path, caplog):
    caplog.set_level("WARNING")  # Dask turns pytest's own handlers off while a cluster is up
    folder = Folder(str(tmp_path))
    first, second = (
        RunRecord(c * 32, f"2026-01-0{i}T00:00:00Z", "complete", 1.0) for i, c in ((1, "a"), (2, "b"))
    )
    for run in (first, second):
        record.write(folder, run, Redactor())
    folder.put(f"{record.RUNS}20260103T000000Z-c.json", b"{")
    newer = {**document.decode(folder.read(second.key)), "of_tomorrow": 1}
    folder.put(second.key, document.encode(newer))
    assert record.read_all(folder) == [first, second]
    assert "skipped" in caplog.text


def test_no_secret_of_a_storage_option_is_in_a_record(tmp_path):
    folder, redact = Folder(str(tmp_path)), Redactor()
    redact.add(["planted-s3cret"])
    run = RunRecord(
        "a" * 32, record.now(), "failed", 1.0, message="denied for planted-s3cret",
        counts=Counters(examples=("x planted-s3cret",)),
        job={"input": {"path": "s3://me:planted@host/x", "note": "planted-s3cret"}},
        slowest=[SlowPartition(0, 1.0, 1, 1, "tcp://planted-s3cret:1")],
    )  # fmt: skip
    record.write(folder, run, redact)
    assert b"planted" not in folder.read(run.key)
    assert record.read_all(folder)[0].message == "denied for ***"


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=2000))
def test_a_time_line_is_bounded_keeps_first_and_last_and_loses_no_total(steps):
    line, seconds = Timeline(), 0.0
    for count, step in enumerate(steps, 1):
        seconds += step
        line.add({"seconds": seconds, "rows": count})
    found = line.columns()
    assert len(found["seconds"]) == len(found["rows"]) <= Timeline.LIMIT
    assert found["rows"][-1] == len(steps)
    assert found["seconds"][0] == pytest.approx(steps[0], abs=1e-3)
    assert found["seconds"] == sorted(found["seconds"])


@given(st.lists(st.tuples(st.floats(0.1, 100), st.integers(0, 1000)), min_size=2, max_size=100))
def test_shown_rates_are_never_negative_and_never_above_the_fastest_step(steps):
    seconds = np.cumsum([step for step, _ in steps]).tolist()
    sums = np.cumsum([grown for _, grown in steps]).tolist()
    fastest = max(grown / step for step, grown in steps)
    assert all(
        0 <= rate <= fastest * 1.001 + 1e-9 for rate in charts.rates(seconds, sums) if rate is not None
    )


def test_an_output_without_rows_has_a_page_too(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, rows=0)
    library.run(job, client=cluster)
    text = Page((tmp_path / "out" / REPORT).read_text()).text
    assert "100% of 0" in text
    assert " in 1 part\n" in text


@pytest.mark.parametrize("failing", ["input", "output"])
def test_a_run_that_a_store_ended_says_so_unless_its_own_store_is_gone(
    tmp_path, tiny_llama, monkeypatch, failing
):
    monkeypatch.setattr(observe, "PROBE_PATIENCE", 0.3)
    output, store = faulty_folder()
    prepared = prepare(load(write_job(tmp_path, tiny_llama), f"output.path={output.url}"))
    record.write(output, RunRecord("earlier", "2026-01-01T00:00:00Z", "complete", 1.0), Redactor())

    def run():
        with observe.observed(prepared, "a" * 32, silent, Milestones()):
            if failing == "output":
                store.gate = lambda operation, key: "busy"
            raise StorageError("the input cannot be read (busy)", "s3://somewhere")

    with pytest.raises(StorageError, match="the input cannot be read"):
        run()
    store.gate = None
    last = record.read_all(output)[-1]
    if failing == "output":
        assert last.run == "earlier"
    else:
        assert (last.outcome, last.message) == ("interrupted", "the input cannot be read (busy)")


def test_the_page_is_called_by_its_job_and_says_at_the_top_what_ran(finished):
    html = (finished / "out" / REPORT).read_text()
    top = Page(html[: html.index('class="cards"')]).text
    assert f"<h1>{finished.name}</h1>" in html
    assert html.index(f"<title>{finished.name}: complete with failed rows</title>")
    for expected in (
        "model",
        "llama",
        "engine",
        "echo",
        "machine",
        "1 worker",
        "price",
        str(finished / "out"),
    ):
        assert expected in top, expected


def test_prompts_that_are_shared_are_a_share_of_all_that_engines_were_asked(finished):
    facts = Facts.read(load(finished / "job.yaml"))
    counts = replace(facts.runs[-1].counts, prompt_tokens=50, output_tokens=80)
    run = replace(facts.runs[-1], counts=counts, shared_tokens=300, real_tokens=180, computed_tokens=200)
    assert "75%, computed once for several rows" in Page(render(replace(facts, runs=[run]))).text


def test_the_page_tells_in_order_when_a_run_came_how_far(finished):
    (run,) = record.read_all(Folder(str(finished / "out")))
    reached = sorted(run.milestones, key=lambda name: run.milestones[name])
    text = Page((finished / "out" / REPORT).read_text()).text
    places = [text.index(f"{name} {run.milestones[name]}") for name in reached]
    assert len(places) > 3
    assert places == sorted(places)


def test_failed_rows_are_shown_with_their_prompts(finished):
    html = (finished / "out" / REPORT).read_text()
    failures = html[html.index("Failed rows") : html.index("Rows to read")]
    assert failures.count("<header>") == 3, "a few of them"
    assert "row 4" in failures
    assert "row 4 x" in Page(failures).text or "has no attribute" in Page(failures).text


def test_the_bill_adds_up_to_what_the_workers_cost(finished):
    (run,) = record.read_all(Folder(str(finished / "out")))
    *parts, whole = bill.lines([run])
    assert [line.name for line in parts] == ["loading", "generating", "idle"]
    assert sum(line.seconds for line in parts) == pytest.approx(run.worker_seconds)
    assert sum(line.cost for line in parts) == pytest.approx(run.cost)
    assert whole.per_thousand_rows == pytest.approx(run.cost / ROWS * 1000)
    assert whole.per_million_tokens == pytest.approx(run.cost / run.counts.tokens * 1e6)


def test_a_priced_run_that_ended_before_its_first_row_has_a_page(finished):
    facts = Facts.read(load(finished / "job.yaml"))
    (run,) = facts.runs
    text = render(replace(facts, runs=[replace(run, counts=Counters())]))
    assert "per 1,000 rows" in text


def sampled(started: str, seconds: list[float], rows: list[int]) -> RunRecord:
    zeros = [0] * len(seconds)
    samples = dict.fromkeys(
        ("prompt_tokens", "output_tokens", "real_tokens", "computed_tokens", "waiting", "pool_fill", "gpu_use",
         "gpu_memory"), zeros,
    )  # fmt: skip
    samples |= {"seconds": seconds, "rows": rows, "workers": [1] * len(seconds)}
    return RunRecord("a" * 32, started, "complete", seconds[-1], samples=samples)


def test_plots_go_over_the_time_of_all_runs_with_a_gap_between_them(monkeypatch):
    drawn = {}

    def over_time(seconds, lines, share=False, starts=()):
        drawn.update({name: (list(seconds), list(values), list(starts)) for name, values in lines.items()})
        return ""

    monkeypatch.setattr(charts, "over_time", over_time)
    first = sampled("2026-01-01T00:00:00Z", [10.0, 20.0, 30.0], [10, 20, 30])
    second = sampled("2026-01-02T00:00:00Z", [10.0, 20.0, 40.0], [0, 5, 10])
    nothing = np.empty(0, np.int64)
    assert [*plots.plots(Look(0, 0, nothing, nothing), [first, second])]
    seconds, values, starts = drawn["rows"]
    assert np.allclose(seconds, [10, 20, 30, np.nan, 40, 50, 70], equal_nan=True)
    assert np.isnan(values[3])
    assert starts == [30.0]


def test_labels_of_axes_are_plain_numbers():
    assert [charts._short(value) for value in (0, 0.2, 0.25, 15, 1500, 2e6)] == [
        "0",
        "0.2",
        "0.25",
        "15",
        "1.5k",
        "2M",
    ]
    svg = charts.over_time([0.0, 50.0, 100.0], {"rows": [0.0, 0.1, 0.2]})
    assert "0.2<" in svg.replace("\n", "")
    assert "m<" not in svg
