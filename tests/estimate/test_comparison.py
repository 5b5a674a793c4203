"""`plan --compare`: the same rows with and without converted weights, and where that is told."""

from __future__ import annotations

import numpy as np
import pytest
import tiny_models
import warm
from packers import repack

import batchrun as library
from batchrun.commands.plan import lines, preview
from batchrun.driver.prepare import prepare
from batchrun.engine.protocol import Completion, EngineSpec
from batchrun.errors import JobError, ModelError
from batchrun.estimate import comparison
from batchrun.estimate.comparison import agreement
from batchrun.estimate.sample import sample
from batchrun.job.job import Job
from batchrun.report import page
from batchrun.storage import Folder
from batchrun.telemetry import agreement as remembered
from batchrun.telemetry import record
from batchrun.telemetry.redact import Redactor
from jobs import batchrun, load, write_job


def runs_of(job: Job) -> list[record.RunRecord]:
    return record.read_all(Folder(job.output.path))


def completion(tokens: list[int], logprobs: list[float], reason: str = "length") -> Completion:
    return Completion(
        0, np.array(tokens, np.int32), reason, values={"logprobs": np.array(logprobs, np.float32)}
    )


def test_tokens_agree_up_to_the_first_difference_of_their_row() -> None:
    pairs = [
        (completion([1, 2, 3], [-1, -1, -1]), completion([1, 2, 3], [-1.5, -1, -1])),
        # Alike again behind a difference says nothing: the model has read another text by then.
        (completion([1, 2, 3, 4], [-1] * 4, "stop"), completion([1, 9, 3, 4], [-2, -1, -1, -1])),
        (completion([5, 6], [-1, -1], "stop"), completion([5], [-1], "stop")),
        (completion([], []), completion([7], [-1])),
    ]
    found = agreement("fp8", pairs)
    assert (found.rows, found.same, found.tokens, found.agreeing) == (4, 1, 9, 5)
    assert found.first_difference == 2
    assert found.logprob_difference == pytest.approx((0.5 + 1) / 5)
    assert (found.ended, found.quantized_ended) == (2, 1)
    alike = agreement("fp8", pairs[:1])
    assert (alike.same, alike.first_difference) == (1, None)
    assert "the others" not in str(alike)


def test_a_plan_compares_both_ways_and_the_report_of_a_run_with_converted_weights_says_what_it_found(
    tmp_path, tiny_llama, cluster, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    warm.fork_engines(monkeypatch)
    generation = {"max_new_tokens": 12, "temperature": 1.0}
    job = write_job(tmp_path, tiny_llama, rows=40, engine={"kind": "padded"}, generation=generation)
    plan = preview(load(job), trial=20.0, compare="fp8")
    found = plan["comparison"]
    assert found["quantization"] == "fp8"
    assert found["estimate"]["seconds"]["likely"] > 0
    about = found["agreement"]
    assert 0 < about["same"] <= about["rows"] == 40
    assert 0 < about["agreeing"] <= about["tokens"] <= 40 * 12
    # Converted weights are not the same weights.
    assert 0 < about["logprob_difference"] < 0.5
    said = [str(line) for line in lines(plan)]
    assert any(line.startswith("with model.quantization: fp8, ") for line in said)
    assert any("sampled rows have the same greedy answer with fp8" in line for line in said)
    # There is no schema, and the padded engine has no keys in fp8.
    assert not any(line.startswith(("valid answers", "with engine.cache_dtype")) for line in said)
    said = [str(line) for line in lines(plan | {"invalid_if_cut": True})]
    ended = f"{about['quantized_ended']} of 40 with fp8, {about['ended']} without"
    assert f"valid answers, those that end by themselves: {ended}" in said

    own = load(job, "model.quantization=fp8")
    library.run(own, client=cluster)
    (run,) = runs_of(own)
    assert run.agreement == remembered.Agreement(**about)
    page.write(own, Redactor())
    assert "sampled rows have the same greedy answer with fp8" in (
        tmp_path / "out/_job/report.html"
    ).read_text().replace("\n", " ")

    plain = load(job, "output.path=plain")
    library.run(plain, client=cluster)
    assert runs_of(plain)[0].agreement is None


def test_a_job_with_keys_and_values_in_fp8_is_compared_with_itself_without_fp8(
    tmp_path, tiny_llama, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    warm.fork_engines(monkeypatch)
    generation = {"max_new_tokens": 12}
    job = load(
        write_job(
            tmp_path,
            tiny_llama,
            rows=20,
            engine={"kind": "auto", "cache_dtype": "fp8"},
            generation=generation,
        ),
        "model.quantization=fp8",
    )
    plan = preview(job, trial=10.0, compare="fp8")
    assert plan["comparison"]["quantization"] is None
    about = plan["comparison"]["agreement"]
    assert 0 < about["agreeing"] <= about["tokens"]
    assert 0 < about["logprob_difference"] < 0.5
    said = [str(line) for line in lines(plan)]
    assert any(line.startswith("without fp8, ") for line in said)
    assert any("the same greedy answer with fp8 weights, keys and values as without" in line for line in said)
    assert any(line.startswith("without engine.cache_dtype: a token's keys and values ") for line in said)
    # Its weights are converted in other runs, too, of which this says nothing.
    fingerprint = prepare(job).model.fingerprint
    assert job.fp8 == "fp8 weights, keys and values"
    assert remembered.recall(fingerprint, job.fp8) == remembered.Agreement(**about)
    assert remembered.recall(fingerprint, "fp8") is None


def test_what_cannot_be_compared_is_refused(tmp_path, tiny_llama, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = write_job(tmp_path, tiny_llama, rows=10, engine={"kind": "padded"})
    code, _, said = batchrun("plan", str(job), "--compare", "fp8")
    assert (code, said.strip()) == (
        2,
        "error: --compare: nothing to compare without a trial; add --trial 60s to --compare fp8",
    )
    scored = write_job(tmp_path, tiny_llama, rows=10, engine={"kind": "padded"}, answer={"score": "kind"})
    with pytest.raises(JobError, match="generates nothing"):
        preview(load(scored), trial=10.0, compare="fp8")
    repack(tiny_models.make_model("llama", tmp_path / "in_fp8"), "static_fp8")
    same = write_job(tmp_path, tmp_path / "in_fp8", rows=10, engine={"kind": "padded"})
    with pytest.raises(JobError, match="weights are in fp8, so that both ways would be the same"):
        preview(load(same), trial=10.0, compare="fp8")

    def answers(spec: EngineSpec, *_: object) -> dict[int, Completion]:
        if spec.quantization is None:
            return {}
        raise ModelError("the model has no linear layers", "model.quantization", "leave the key out")

    monkeypatch.setattr(comparison, "_answers", answers)
    prepared = prepare(load(job))
    with pytest.raises(
        JobError, match=r"plan --compare: the model has no linear layers; leave out --compare"
    ):
        comparison.compare(prepared, sample(prepared, 10, 4.0), "fp8", 1.0)
