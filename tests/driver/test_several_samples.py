"""Several answers of a row, as their user runs them: lists, failures, stops, retries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
import yaml

import batchrun as library
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError, ExitCode, JobError
from jobs import answers, batchrun, load, write_job

ROWS, SAMPLES = 14, 3
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
    tmp_path, tiny_llama, form
):
    job = job_of(tmp_path, tiny_llama, engine={"kind": "padded"}, answer=form, output={"failed": "failed"},
                 generation={"max_new_tokens": 4 if "choices" in form else 11})  # fmt: skip
    assert batchrun("run", str(job))[0] == ExitCode.FAILED_ROWS
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
    more = ("--error", "INVALID_OUTPUT", "--set", "generation.max_new_tokens=60")
    assert batchrun("retry", str(job), *more)[0] == ExitCode.COMPLETE
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


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"generation": {"temperature": 0}}, "samples of a greedy answer are all the same: set generation.temperature"),
        ({"output": {"samples": "rows"}}, "output.samples: a part has a row for each of the input's: use list"),
        ({"generation": {"samples": 0}}, "generation.samples: must be at least 1"),
        ({"answer": {"choices": {"column": "labels"}}}, "answer.choices: choices are the same for all rows"),
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
