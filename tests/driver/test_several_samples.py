"""Several answers of a row, as their user runs them: lists, failures, stops, retries."""

from __future__ import annotations

import html
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

import batchrun as library
from batchrun.commands.plan import preview
from batchrun.commands.status import status
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError, ExitCode, JobError, OutputError
from batchrun.job.output import OUTPUT_COLUMNS
from jobs import answers, batchrun, dataset, load, write_job

ROWS, SAMPLES = 14, 3
LOGPROBS = ("answer_logprobs", "answer_mean_logprob")
PER_SAMPLE = ("answer", "finish_reason", "output_tokens")


def job_of(folder: Path, model: Path, samples: int = SAMPLES, **sections: Any) -> Path:
    folder.mkdir(exist_ok=True)
    generation = {"max_new_tokens": 10, "temperature": 1.2, "samples": samples}
    sections["generation"] = {**generation, **sections.get("generation", {})}
    return write_job(folder, model, rows=ROWS, limits={"max_error_rate": 1.0}, **sections)


def run(job: Path, client: Any, out: str, *overrides: str) -> list[dict[str, Any]]:
    own = load(job, f"output.path={out}", *overrides)
    library.run(own, client=client)
    assert verify(own).found.passed
    return answers(job.parent / out).to_pylist()


def test_each_row_has_its_samples_as_lists_and_both_engines_and_any_number_of_samples_agree(
    tmp_path, tiny_llama, cluster
):
    job = job_of(tmp_path, tiny_llama, answer={"logprobs": 1})
    one = run(job, cluster, "one", "engine.kind=padded", "generation.samples=1")
    more = {kind: run(job, cluster, kind, f"engine.kind={kind}") for kind in ("padded", "paged")}
    for a, b, single in zip(more["padded"], more["paged"], one, strict=True):
        assert [a[name] for name in PER_SAMPLE] == [b[name] for name in PER_SAMPLE]
        assert [b[name][0] for name in PER_SAMPLE] == [single[name] for name in PER_SAMPLE]
        assert len(set(b["answer"])) == SAMPLES
        assert b["status"] == "ok"
        assert b["prompt_tokens"] == single["prompt_tokens"]
        assert [len(values) for values in b["answer_logprobs"]] == b["output_tokens"]
        assert [len(values) for values in b["answer_top_logprobs"]] == b["output_tokens"]
        assert len(b["answer_mean_logprob"]) == SAMPLES
    schema = answers(tmp_path / "paged").schema
    assert schema.field("answer").type == pa.list_(pa.string())
    assert schema.field("answer_logprobs").type == pa.list_(pa.list_(pa.float32()))
    with pytest.raises(ChangedError, match="samples"):
        library.run(load(job, "generation.samples=4", "output.path=paged"), client=cluster)


@pytest.mark.parametrize("form", [{"choices": ["yes", "no", "maybe"]}, {"schema": {"type": "object", "properties": {
    "size": {"type": "integer", "minimum": 0, "maximum": 99999}}, "required": ["size"]}}])  # fmt: skip
def test_typed_answers_are_lists_and_a_retry_completes_rows_with_a_sample_that_failed(
    tmp_path, tiny_llama, cluster, form
):
    job = job_of(tmp_path, tiny_llama, engine={"kind": "padded"}, answer=form, output={"failed": "failed"},
                 generation={"max_new_tokens": 4 if "choices" in form else 11})  # fmt: skip
    assert library.run(load(job), client=cluster).exit_code == ExitCode.FAILED_ROWS
    assert verify(load(job)).found.passed
    before = answers(tmp_path / "out").to_pylist()
    failed = [row for row in before if row["status"] == "failed"]
    assert failed
    for row in before:
        assert all(len(row[name]) == SAMPLES for name in PER_SAMPLE)
        bad = [i for i, answer in enumerate(row["answer"]) if answer is None]
        assert bool(bad) == (row["status"] == "failed")
        if bad:
            assert row["error"] == f"INVALID_OUTPUT: sample {bad[0]}: the answer was cut before its end"
    assert any(any(answer is not None for answer in row["answer"]) for row in failed), "good samples stay"
    longer = load(job, "generation.max_new_tokens=60")
    assert library.retry(longer, errors=["INVALID_OUTPUT"], client=cluster).exit_code == ExitCode.COMPLETE
    assert verify(load(job)).exit_code == ExitCode.COMPLETE
    after = answers(tmp_path / "out").to_pylist()
    for old, new in zip(before, after, strict=True):
        kept = [(a, b) for a, b in zip(old["answer"], new["answer"], strict=True) if a is not None]
        assert all(a == b for a, b in kept)
        assert None not in new["answer"]


def test_rows_that_never_reach_an_engine_have_lists_of_nothing(tmp_path, tiny_llama, cluster):
    job = job_of(tmp_path, tiny_llama, engine={"kind": "paged"}, answer={"logprobs": 0})
    rows = run(job, cluster, "out", "prompt.max_bytes=12")
    failed = [row for row in rows if row["status"] == "failed"]
    assert 0 < len(failed) < ROWS
    for row in failed:
        assert (row["answer"], row["finish_reason"]) == ([None] * SAMPLES, ["error"] * SAMPLES)
        assert (row["output_tokens"], row["answer_logprobs"]) == ([0] * SAMPLES, [None] * SAMPLES)
    manifest = json.loads((tmp_path / "out/_job/manifest.json").read_text())
    assert (manifest["rows"], manifest["failed"]) == (ROWS, len(failed))


def test_samples_in_rows_are_those_of_lists_each_beside_its_input(tmp_path, tiny_llama, cluster):
    own = {"failed": "failed", "row_column": "source"}
    job = job_of(tmp_path, tiny_llama, answer={"logprobs": 0}, prompt={"max_bytes": 14}, output=own)
    lists = run(job, cluster, "lists", "engine.kind=padded")
    found = {
        kind: run(job, cluster, kind, f"engine.kind={kind}", "output.samples=rows")
        for kind in ("padded", "paged")
    }
    table = answers(tmp_path / "paged")
    for one, other in zip(found["padded"], found["paged"], strict=True):
        assert {**one, **dict.fromkeys(LOGPROBS)} == {**other, **dict.fromkeys(LOGPROBS)}
    carried = dataset(ROWS).column_names
    assert table.column_names == [
        *carried, "source", "sample", *OUTPUT_COLUMNS, "answer_logprobs", "answer_mean_logprob"
    ]  # fmt: skip
    assert table.schema.field("sample").type == pa.int32()
    assert table.schema.field("answer").type == pa.string()
    repeated = dataset(ROWS).take([row for row in range(ROWS) for _ in range(SAMPLES)])
    assert table.select(carried).equals(repeated)
    assert table["sample"].to_pylist() == [*range(SAMPLES)] * ROWS
    for i, row in enumerate(found["paged"]):
        whole, sample = lists[i // SAMPLES], i % SAMPLES
        for name in PER_SAMPLE:
            assert row[name] == whole[name][sample]
        assert len(row["answer_logprobs"] or []) == row["output_tokens"]
        for name in ("prompt_tokens", "status", "error", "source"):
            assert row[name] == whole[name]
    failed = sum(row["status"] == "failed" for row in lists)
    assert 0 < failed < ROWS
    folder = tmp_path / "paged"
    manifest = json.loads((folder / "_job/manifest.json").read_text())
    told = (manifest["rows"], manifest["input_rows"], manifest["failed"])
    assert told == (ROWS * SAMPLES, ROWS, failed * SAMPLES)
    before = json.loads((tmp_path / "lists/_job/manifest.json").read_text())
    assert (before["rows"], before["input_rows"]) == (ROWS, None)
    for name in ("prompt_tokens", "output_tokens"):
        assert manifest[name] == before[name], "a prompt counts once, in lists and in rows"
    apart = pa.concat_tables(pq.read_table(path) for path in sorted((folder / "failed").iterdir()))
    assert apart.num_rows == failed * SAMPLES
    assert apart["sample"].to_pylist() == [*range(SAMPLES)] * failed
    places = zip(apart["source_row_group"].to_pylist(), apart["source_row"].to_pylist(), strict=True)
    assert len(set(places)) == failed


def test_in_rows_a_retry_generates_the_samples_that_failed_and_no_others(tmp_path, tiny_llama, cluster):
    form = {"choices": ["yes", "no", "maybe"]}
    rows = {"failed": "failed", "samples": "rows", "columns": {"sample": "try"}}
    job = job_of(tmp_path, tiny_llama, engine={"kind": "padded"}, answer=form, output=rows,
                 generation={"max_new_tokens": 4})  # fmt: skip
    code, said, _ = batchrun("run", str(job))
    before = answers(tmp_path / "out").to_pylist()
    failed = [i for i, row in enumerate(before) if row["status"] == "failed"]
    assert code == ExitCode.FAILED_ROWS
    assert f"{len(before) - len(failed)} of {ROWS * SAMPLES} rows answered ({SAMPLES} samples of each" in said
    shown = status(load(job))
    assert (shown.rows, shown.rows_committed, shown.failed) == (ROWS, ROWS, len(failed))
    assert f"{len(failed)} samples failed" in shown.lines()
    assert "failed rows, 3 for each of the input" in html.unescape(
        (tmp_path / "out/_job/report.html").read_text()
    )
    mixed = {i // SAMPLES for i in failed} & {
        i // SAMPLES for i, r in enumerate(before) if r["status"] == "ok"
    }
    assert mixed, "some rows have both"
    assert {before[i]["error"] for i in failed} == {"INVALID_OUTPUT: the answer was cut before its end"}
    longer = load(job, "generation.max_new_tokens=60")
    again = library.retry(longer, errors=["INVALID_OUTPUT"], client=cluster)
    assert again.exit_code == ExitCode.COMPLETE
    checked = verify(load(job))
    assert checked.exit_code == ExitCode.COMPLETE
    assert (checked.to_json()["rows"], checked.to_json()["input_rows"]) == (ROWS * SAMPLES, ROWS)
    assert f"every row of the plan is there with its {SAMPLES} samples" in checked.lines()[0]
    after = answers(tmp_path / "out").to_pylist()
    assert [i for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b] == failed
    assert all(after[i]["output_tokens"] > 4 for i in failed)
    manifest = json.loads((tmp_path / "out/_job/manifest.json").read_text())
    assert sum(part["rows"] for part in manifest["retries"][0]["parts"]) == len(failed)


def test_verify_finds_samples_that_are_numbered_otherwise(tmp_path, tiny_llama, cluster):
    job = job_of(tmp_path, tiny_llama, engine={"kind": "padded"}, output={"samples": "rows"})
    own = load(job)
    library.run(own, client=cluster)
    (part, *_) = sorted((tmp_path / "out/data").iterdir())
    table = pq.read_table(part)
    place = table.column_names.index("sample")
    numbers = pa.array([0] * table.num_rows, pa.int32())
    told = pq.read_metadata(part).metadata[b"batchrun"].decode()
    with pq.ParquetWriter(part, table.schema) as writer:
        writer.write_table(table.set_column(place, table.schema.field("sample"), numbers))
        writer.add_key_value_metadata({"batchrun": told})
    assert any("are not 3 samples of each row" in problem for problem in verify(own).found.problems)


def test_the_sample_column_gives_way_to_one_of_the_input(tmp_path, tiny_llama, cluster):
    job = job_of(tmp_path, tiny_llama, output={"samples": "rows", "columns": {"sample": "kind"}})
    with pytest.raises(OutputError, match="the name 'kind' of the sample column is taken") as refusal:
        library.run(load(job), client=cluster)
    assert "set output.columns: {sample: sample_2}" in str(refusal.value)


def test_plan_and_a_data_frame_have_a_row_for_each_sample(tmp_path, tiny_llama, cluster):
    job = job_of(tmp_path, tiny_llama, engine={"kind": "padded"}, output={"samples": "rows"})
    own = load(job)
    columns = preview(own)["columns"]
    assert (columns["sample"], columns["answer"]) == ("int32", "string")
    result = library.run(own, client=cluster)
    assert (result.rows, result.input_rows, result.ok) == (ROWS * SAMPLES, ROWS, ROWS * SAMPLES)
    assert (result.counts.rows, result.requests) == (ROWS, ROWS)
    frame = result.to_dask().compute()
    assert [*frame.columns] == [*columns]
    assert frame["sample"].to_list() == [*range(SAMPLES)] * ROWS
    again = library.run(own, client=cluster)
    assert (again.requests, again.rows, again.input_rows) == (0, ROWS * SAMPLES, ROWS)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"generation": {"temperature": 0}}, "samples of a greedy answer are all the same: set generation.temperature"),
        ({"output": {"samples": "rows"}, "generation": {"samples": 1}},
         "output.samples: rows is for several samples: set generation.samples"),
        ({"output": {"columns": {"sample": "k"}}}, "output.columns: sample is written with output.samples: rows"),
        ({"generation": {"samples": 0}}, "generation.samples: must be at least 1"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_is_refused_with_the_fix(tmp_path, tiny_llama, sections, message):
    job = job_of(tmp_path, tiny_llama, **sections)
    with pytest.raises(JobError) as refusal:
        load(job)
    assert message in str(refusal.value)


def test_a_job_without_samples_keeps_the_identity_that_it_had(tmp_path, tiny_llama):
    job = write_job(tmp_path, tiny_llama)
    assert "samples" not in load(job).deciding()["generation"]
    tree = yaml.safe_load(job.read_text())
    tree["generation"].update(samples=2, temperature=1.0)
    job.write_text(yaml.safe_dump(tree))
    decides = load(job).deciding()
    assert (decides["generation"]["samples"], decides["output"]["samples"]) == (2, "list")
