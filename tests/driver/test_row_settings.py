"""Settings that columns give each row, as their user runs them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import batchrun as library
from batchrun.commands.plan import preview
from batchrun.commands.verify import verify
from batchrun.driver.prepare import prepare
from batchrun.errors import ChangedError, ExitCode, InputError, JobError
from jobs import answers, batchrun, load, write_job

ROWS = 18
BUDGETS = [1, 7, None, 30, 0, 100_000] * 3
COLUMNS = {
    "budget": pa.array(BUDGETS, pa.int64()),
    "heat": pa.array([0.0, 1.5, None, float("nan"), 1.0, 1.0] * 3),
    "end": pa.array([["e"], None, [], ["a", "o"], ["x"], ["x"]] * 3),
    "number": pa.array([None, 3, 3] * 6, pa.uint64()),
}
GENERATION = {
    "max_new_tokens": {"column": "budget", "default": 12},
    "temperature": {"column": "heat", "default": 0.7},
    "stop": {"column": "end", "default": ["i"]},
    "seed": {"column": "number", "default": 5},
}


def job_of(folder: Path, model: Path, generation: dict[str, Any], kind: str = "padded") -> Path:
    folder.mkdir(exist_ok=True)
    job = write_job(folder, model, rows=ROWS, engine={"kind": kind}, limits={"max_error_rate": 1.0})
    tree = yaml.safe_load(job.read_text())
    tree["generation"] = generation
    job.write_text(yaml.safe_dump(tree))
    table = pq.read_table(folder / "in.parquet")
    for name, column in COLUMNS.items():
        table = table.append_column(name, column)
    pq.write_table(table, folder / "in.parquet")
    return job


def test_rows_have_their_own_settings_from_both_engines_and_values_that_do_not_fit_are_their_errors(
    tmp_path, tiny_llama, cluster
):
    tables = {}
    job = job_of(tmp_path, tiny_llama, GENERATION)
    for kind in ("padded", "paged"):
        own = load(job, f"engine.kind={kind}", f"output.path={kind}")
        library.run(own, client=cluster)
        assert verify(own).found.passed
        # But for the settings, among which there is NaN, which is not even itself.
        tables[kind] = answers(tmp_path / kind).drop_columns([*COLUMNS]).to_pylist()
    assert tables["padded"] == tables["paged"]
    for i, row in enumerate(tables["paged"]):
        budget = 12 if BUDGETS[i] is None else BUDGETS[i]
        if i % 6 < 3:
            assert row["status"] == "ok"
            assert row["output_tokens"] <= budget
            assert row["finish_reason"] == "stop" or row["output_tokens"] == budget
            stops = {0: ["e"], 1: ["i"], 2: []}[i % 6]
            assert not any(stop in row["answer"] for stop in stops)
        else:
            assert row["answer"] is None
    assert [row["error"] for row in tables["paged"][3:6]] == [
        "INVALID_SETTING: temperature is nan in column 'heat': must be a finite number",
        "INVALID_SETTING: max_new_tokens is 0 in column 'budget': must be at least 1",
        "INVALID_SETTING: max_new_tokens is 100000 in column 'budget': leaves no room for a prompt in the model's 512",
    ]
    with pytest.raises(ChangedError, match=r"generation.seed.*number"):
        library.run(load(job, "generation.seed=5", "output.path=paged"), client=cluster)
    # The estimate counts with the rows' own limits: 1, 7 and the default.
    assert preview(load(job, "output.path=other"))["max_new_tokens"] == 12


def test_columns_that_say_what_the_job_says_change_no_answer(tmp_path, tiny_llama, cluster):
    same = {"max_new_tokens": 12, "temperature": 0.7, "seed": 5, "stop": ["i"]}
    job = job_of(tmp_path, tiny_llama, same)
    table = pq.read_table(tmp_path / "in.parquet").drop_columns([*COLUMNS])
    table = table.append_column("budget", pa.array([12.0, None] * 9))
    table = table.append_column("ends", pa.array(["i", None] * 9))
    pq.write_table(table, tmp_path / "in.parquet")
    library.run(load(job), client=cluster)
    more = (
        "generation.max_new_tokens={column: budget, default: 12}",
        "generation.stop={column: ends, default: [i]}",
        "output.path=own",
    )
    library.run(load(job, *more), client=cluster)
    assert answers(tmp_path / "out").equals(answers(tmp_path / "own"))


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("max_new_tokens", {"column": "bugdet"}, "no input file has a column 'bugdet', did you mean 'budget'?"),
        ("max_new_tokens", {"column": "text"}, "generation.max_new_tokens: column 'text' is string, and not numbers"),
        ("temperature", {"column": "at"}, "generation.temperature: column 'at' is timestamp"),
        ("stop", {"column": "budget"}, "generation.stop: column 'budget' is int64, and not texts or lists of texts"),
        ("top_p", {"column": "heat", "default": 0}, "generation.top_p.default: must be above 0 (got 0)"),
        ("seed", {"colum": "heat"}, "unknown key generation.seed.colum, did you mean 'column'?"),
        ("stop", ["a", ""], "generation.stop: an empty stop text would end every answer at once"),
    ],
)  # fmt: skip
def test_a_column_that_cannot_be_the_setting_is_refused_before_anything_starts(
    tmp_path, tiny_llama, key, value, message
):
    job = job_of(tmp_path, tiny_llama, {key: value})
    with pytest.raises((InputError, JobError)) as refusal:
        prepare(load(job))
    assert message in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_the_command_tells_of_values_that_do_not_fit(tmp_path, tiny_llama):
    job = job_of(tmp_path, tiny_llama, GENERATION)
    code, out, err = batchrun("run", str(job))
    assert code == ExitCode.FAILED_ROWS, err
    assert "INVALID_SETTING 9" in out + err
