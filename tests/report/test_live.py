"""What a person sees of a run: the view of it while it goes on, and the end of it."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from batchrun.counters import Counters
from batchrun.engine.protocol import EngineStats
from batchrun.report import summary
from batchrun.report.live import View
from batchrun.report.result import RunResult
from batchrun.telemetry.gpu import Gpu
from batchrun.telemetry.progress import Progress, WorkerView
from jobs import load, write_job

CARD = Gpu("H200", 0.75, 60 << 30, 140 << 30)


@pytest.fixture
def view(tmp_path: Path, tiny_llama: Path) -> View:
    folder = tmp_path / "reviews"
    folder.mkdir()
    return View(load(write_job(folder, tiny_llama), "cluster.price_per_gpu_hour=2.0"))


def at(seconds: float, rows: int, *doing: str) -> Progress:
    """A run with a worker for each thing that is done."""
    stats = EngineStats(
        engine="paged", pid=1, requests=30, completions=20, prompt_tokens=rows * 10, output_tokens=rows * 10,
        computed_tokens=rows * 30, gauges={"pages": 100, "pages_free": 25},
    )  # fmt: skip
    failed = min(rows, 3)
    return Progress(
        seconds=seconds, partitions=10, partitions_done=2, partitions_in_flight=3, rows=1000, rows_done=rows,
        counts=Counters(
            rows=rows, failed=failed, pulled=1000, sent_tokens=10000, prompt_tokens=rows * 10, output_tokens=rows * 10,
            errors={"NULL_PROMPT": failed} if failed else {},
            finish_reasons={"error": failed, "length": rows // 10, "stop": rows - rows // 10 - failed} if rows else {},
        ),
        workers=len(doing), worker_time={"generating": seconds * len(doing)},
        worker_views=[
            WorkerView(f"tcp://10.0.0.{i}:9000", "host", 2, 2, 1 << 30, what, stats if rows else None, CARD)
            for i, what in enumerate(doing, 1)
        ],
        engines=[stats] if rows else [],
    )  # fmt: skip


def shown(view: View, now: Progress | None, width: int) -> list[str]:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    console.print(view.render(now))
    return console.file.getvalue().splitlines()


COURSE = [
    None,
    at(1, 0, "starting"),
    at(5, 0, "loading", "compiling"),
    at(10, 100, "generating", "generating"),
    at(20, 200, "generating", "generating"),
    at(30, 300, "generating", "sealing"),
    at(31, 300),
    at(40, 400, "idle"),
]


def test_the_view_names_job_model_and_what_each_worker_does(view):
    words = [" ".join(shown(view, now, 110)) for now in COURSE]
    assert all("reviews" in text and "llama" in text for text in words), "the job and its model"
    assert "starting" in words[0]
    assert "loading the model" in words[2]
    assert "compiling the model" in words[2]
    for expected in (
        "267 ended by themselves, 30 (10.1%) cut at generation.max_new_tokens",
        "30%", "about 69 s left", "300 of 1,000", "2 of 10 parts", "NULL_PROMPT 3", "pool 75% full", "0.667",
        "10.0.0.1:9000", "generating, 200 tokens/s, 10 rows in hand", "sealing", "GPU 75% busy",
        "0.0333 so far, about 0.1",
    ):  # fmt: skip
        assert expected in " ".join(words[5].split()), (expected, words[5])
    assert "waiting for a worker" in words[6]


def test_one_row_is_not_called_rows(view):
    engine = replace(COURSE[5].worker_views[0].engine, requests=8, completions=7)
    one = replace(COURSE[5].worker_views[0], engine=engine)
    words = " ".join(shown(view, replace(COURSE[5], worker_views=[one]), 110))
    assert "1 row in hand" in words


def test_of_several_samples_engines_hold_samples_and_not_rows(view):
    counts = replace(COURSE[5].counts, more_samples=200)
    worker = replace(COURSE[5].worker_views[0], counts=counts)
    words = " ".join(shown(view, replace(COURSE[5], counts=counts, worker_views=[worker]), 110))
    assert "10 samples in hand" in words
    assert "10 samples in engines" in words


def test_eighty_columns_hold_what_engines_hold_even_of_a_full_gpu(view):
    engine = replace(
        COURSE[5].engines[0], requests=22_048, completions=10_000, gauges={"pages": 9, "pages_free": 0}
    )
    worker = replace(COURSE[5].worker_views[0], engine=engine)
    counts = replace(COURSE[5].counts, more_samples=200)
    lines = shown(view, replace(COURSE[5], counts=counts, worker_views=[worker]), 80)
    assert " ".join(lines[6].split()).endswith(" 0.667, pool 100% full, 12,048 samples in engines")


@pytest.mark.parametrize("width", [40, 80, 160])
def test_no_line_moves_while_a_run_goes_on(view, width):
    screens = [shown(view, now, width) for now in COURSE]
    assert {len(line) <= width for screen in screens for line in screen} == {True}
    names = [[line.split()[0] for line in screen[2:9]] for screen in screens]
    assert all(one == ["time", "rows", "tokens", "answers", "batches", "failed", "cost"] for one in names), (
        names
    )
    heights = [len(screen) for screen in screens]
    assert heights == sorted(heights)
    assert heights[2] == heights[-1] == heights[0] + 1, "a line more once for the second worker, and for good"


def test_the_last_line_has_room_for_the_echo_of_ctrl_c(view):
    assert {shown(view, now, 80)[-1].rstrip() for now in COURSE} == {""}


def test_many_workers_take_few_lines(view):
    lines = shown(view, at(1, 100, *["generating"] * 90, *["loading"] * 10), 100)
    assert len(lines) < 20
    assert "and 92 more: 82 generating, 10 loading" in lines[-2]


def result(**more) -> RunResult:
    values = {
        "output": "s3://lake/out", "rows": 1000, "ok": 1000, "failed": 0, "parts": 2, "prompt_tokens": 120_000,
        "output_tokens": 60_000, "errors": {}, "examples": {}, "seconds": 125.0, "finish_reasons": {"stop": 1000},
        "counts": Counters(rows=1000, requests=1000, prompt_tokens=120_000, output_tokens=60_000),
        "engines": [
            EngineStats(
                engine="padded", attention="sdpa", dtype="float32", device="cpu", busy_seconds=100.0,
                prompt_tokens=120_000, output_tokens=60_000, computed_tokens=200_000,
                gauges={"batch_tokens": 16384.0, "share": 0.123456},
            )
        ],
    }  # fmt: skip
    return RunResult(**{**values, **more})


def test_the_final_screen_has_readable_numbers():
    text = "\n".join(summary.run_lines(result()))
    for expected in (
        "1,000 of 1,000 rows",
        "2 min 05 s",
        "60,000 out",
        "480 tokens/s",
        "batch tokens 16,384",
        "0.123",
    ):
        assert expected in text, text
    assert "e+" not in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"finish_reasons": {"stop": 970, "length": 30}}, "warning: 3.0% of the answers are cut at generation.max_new"),
        ({"empty": 30}, "warning: 3.0% of the answers are empty"),
    ],
)  # fmt: skip
def test_more_than_two_per_cent_of_cut_or_empty_answers_are_a_warning(more, says):
    assert says in "\n".join(summary.run_lines(result(**more)))


def test_cut_answers_that_are_invalid_are_a_share_of_all_answers():
    text = "\n".join(
        summary.run_lines(result(ok=250, failed=750, finish_reasons={"stop": 250, "length": 750}))
    )
    assert "750 (75.0%) cut" in text


def test_two_per_cent_of_cut_and_empty_answers_are_told_without_a_warning():
    text = "\n".join(summary.run_lines(result(finish_reasons={"stop": 980, "length": 20}, empty=20)))
    assert "20 (2.0%) cut at generation.max_new_tokens, 20 (2.0%) empty" in text
    assert "warning" not in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (0.1234, "0.123"), (12.34, "12.3"), (16384.0, "16,384"), (1234567.8, "1,234,568")],
)
def test_numbers_are_written_as_people_write_them(value, text):
    assert summary.number(value) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0.00"), (12.5, "12.50"), (0.12344, "0.1234"), (0.00123, "0.0012"), (1234.5, "1,234.50")],
)
def test_small_amounts_of_money_keep_their_digits(value, text):
    assert summary.money(value) == text


def test_a_struct_is_shown_a_field_to_a_line_and_a_probability_by_its_first_digits():
    cell = summary._cell({"yes": 0.957495, "no": 0.0424905, "maybe": 1.4e-05, "name": None, "tags": ["a"]})
    assert cell.splitlines() == ["yes: 0.9575", "no: 0.0425", "maybe: 1.4e-05", "name: ", 'tags: ["a"]']
    assert summary._cell({"price": 1234567.25, "count": 12}) == "price: 1234567.25\ncount: 12"


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_line_that_does_not_fit_ends_in_an_ellipsis(view: View, width: int) -> None:
    wide, narrow = (Console(width=w, file=io.StringIO(), color_system=None) for w in (400, width))
    for console in (wide, narrow):
        console.print(view.render(at(60.0, 500, "generating", "generating")))
    whole, shown = (console.file.getvalue().splitlines() for console in (wide, narrow))  # type: ignore[attr-defined]
    assert len(whole) == len(shown)
    # The second line is the bar, as wide as the terminal.
    for line, fitted in zip(whole[2:], shown[2:], strict=True):
        line, fitted = line.rstrip(), fitted.rstrip()
        assert fitted == line or (fitted.endswith("…") and line.startswith(fitted[:-1]))
