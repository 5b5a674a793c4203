"""`batchrun bench`: same rows for every engine, exact lengths, honest figures."""

from __future__ import annotations

import pytest

from batchrun.commands.bench import WORKLOADS, Workload, bench, bench_job, format_results
from batchrun.commands.plan import lines, preview
from batchrun.errors import JobError, ModelError
from jobs import load, write_job


def test_both_engines_run_the_same_rows_and_are_compared() -> None:
    workload = Workload("own", [[5, 6, 7] * n for n in (3, 40, 11, 25)], [4, 9, 2, 6])
    results = bench("tiny", workload, engines=["paged", "padded"], device="cpu")
    assert [r.engine for r in results] == ["paged", "padded"]
    for result in results:
        assert result.rows == 4
        assert result.output_tokens == 21
        assert result.prompt_tokens == 237
        assert 0 < result.first_row_seconds <= result.seconds
        assert 0 < result.roofline_share < 1
        assert 0 < result.stats.padding_efficiency <= 1.2
    table = format_results(results)
    assert "paged" in table
    assert "padded" in table


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_named_workload_is_the_same_for_the_same_seed(name: str) -> None:
    first, again, other = (Workload.named(name, 50, 32000, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.common == (600 if name == "extract" else 0)
    assert max(len(p) + n for p, n in zip(first.prompts, first.new_tokens, strict=True)) == first.longest


def test_what_cannot_be_measured_is_named() -> None:
    with pytest.raises(JobError, match="sumarise"):
        bench("tiny", "sumarise", device="cpu")
    with pytest.raises(JobError, match="vapour"):
        bench("tiny", "write", engines=["vapour"], device="cpu")
    with pytest.raises(ModelError, match="nowhere"):
        bench("/nowhere", "write", device="cpu")


def test_a_bench_of_a_job_is_remembered_and_a_plan_says_that_it_knows_no_output_lengths(
    tmp_path, tiny_llama, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    job = load(
        write_job(tmp_path, tiny_llama, engine={"kind": "padded"}, generation={"max_new_tokens": 4}, rows=30)
    )
    assert preview(job)["estimate"] is None
    (result,) = bench_job(job, rows=20)
    assert (result.engine, result.rows, result.output_tokens) == ("padded", 20, 80)
    assert "--engine paged" in format_results([result])
    about = preview(job)["estimate"]
    assert about["output_bound"]
    assert about["output_tokens"]["likely"] == 120
    assert 0 < about["seconds"]["low"] < about["seconds"]["high"]
    assert "max_new_tokens for each" in str(lines(preview(job)))
