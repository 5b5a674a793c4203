"""`batchrun bench`: same rows for every engine, exact lengths, honest figures."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import warm
from tiny_models import model_folder

from batchrun.commands import bench as benchmark
from batchrun.commands.bench import bench, bench_job, format_results
from batchrun.commands.plan import lines, preview
from batchrun.commands.roofline import Ceilings, floor_seconds
from batchrun.commands.workloads import WORKLOADS, Workload
from batchrun.driver.prepare import prepare
from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.errors import EngineError, FaultCode, JobError, ModelError, RowFault
from batchrun.estimate.records import recall
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


def test_an_engine_over_two_gpus_is_measured_and_remembered_as_one(
    tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    warm.fork_engines(monkeypatch)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = {"engine": {"kind": "paged"}, "generation": {"max_new_tokens": 5}, "rows": 4}
    job = load(write_job(tmp_path, tiny_llama, **parts), "engine.gpus=2")
    (result,) = bench_job(job)
    assert not torch.distributed.is_initialized(), "its ranks have ended"
    assert (result.engine, result.gpus, result.output_tokens) == ("paged", 2, 20)
    assert "2 of cpu, float32; paged" in format_results([result])
    known = recall(prepare(job), mean_prompt=10.0)
    assert known is not None
    assert known.gpus == 2
    assert recall(prepare(load(tmp_path / "job.yaml")), mean_prompt=10.0) is None
    with pytest.raises(JobError, match="runs on one GPU"):
        bench("tiny", "6/3", engines=["padded"], gpus=2)
    with pytest.raises(ModelError, match="cannot be divided by 3"):
        bench("tiny", "6/3", rows=2, device="cpu", gpus=3)


@pytest.mark.parametrize("name", WORKLOADS)
def test_a_named_workload_is_the_same_for_the_same_seed(name: str) -> None:
    first, again, other = (Workload.named(name, 50, 32000, seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other
    assert first.common == (600 if name == "extract" else 0)
    assert max(len(p) + n for p, n in zip(first.prompts, first.new_tokens, strict=True)) == first.longest


def test_a_shape_has_the_same_lengths_in_every_row_and_shares_nothing() -> None:
    workload = Workload.named("100/20", 30, 32000, seed=1)
    assert (workload.name, workload.new_tokens) == ("100/20", [20] * 30)
    assert {len(prompt) for prompt in workload.prompts} == {100}
    assert len({prompt[0] for prompt in workload.prompts}) > 25
    (result,) = bench("tiny", "6/3", rows=5, device="cpu")
    assert (result.workload, result.prompt_tokens, result.output_tokens) == ("6/3", 30, 15)


def test_what_cannot_be_measured_is_named() -> None:
    for wrong in ("0/5", "5/0", "1000", "1000/", "a/b", "1.5/2", "-3/4"):
        with pytest.raises(JobError, match="or a shape such as 1000/200"):
            bench("tiny", wrong, device="cpu")
    with pytest.raises(JobError, match="sumarise"):
        bench("tiny", "sumarise", device="cpu")
    with pytest.raises(JobError, match="vapour"):
        bench("tiny", "write", engines=["vapour"], device="cpu")
    with pytest.raises(ModelError, match="nowhere"):
        bench("/nowhere", "write", device="cpu")


def test_fp8_of_a_model_without_linear_layers_is_refused() -> None:
    with pytest.raises(
        ModelError, match="no linear layers that could be converted to fp8; measure it without"
    ):
        bench(str(model_folder("gpt2")), "6/3", rows=2, device="cpu", quantization="fp8")


def test_the_paged_engines_random_weights_need_no_folder_on_one_gpu_either() -> None:
    options: dict[str, object] = {"cache_tokens": 512}
    spec = EngineSpec("paged", "/none", "/none", dtype="float32", max_context=64, options=options)
    engine = PagedEngine.load(spec, benchmark._config("tiny"))
    (completion,) = engine.generate(iter([Request(0, np.array([5, 6, 7], np.int32), 4)]))
    assert len(completion.token_ids) == 4


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


def test_what_was_measured_without_fp8_says_nothing_of_fp8(tmp_path, tiny_llama, monkeypatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    parts = {"engine": {"kind": "padded"}, "generation": {"max_new_tokens": 4}, "rows": 30}
    job = load(write_job(tmp_path, tiny_llama, **parts))
    bench_job(job, rows=20)
    assert preview(job)["estimate"] is not None
    quantized = job.model_copy(update={"model": job.model.model_copy(update={"quantization": "fp8"})})
    plan = preview(quantized)
    assert plan["estimate"] is None
    assert plan["memory"]["quantization"] == "fp8"
    assert plan["memory"]["fp8_weights"] < plan["memory"]["weights"]
    assert "without model.quantization" in str(lines(plan))
    (result,) = bench_job(quantized, rows=20)
    assert result.stats.dtype == "fp8 and float32"
    assert preview(quantized)["estimate"] is not None


@pytest.mark.parametrize(
    ("name", "prompts", "outputs"),
    [("long", (4000, 8000, 24000), (16, 150, 500)), ("chat", (4, 90, 6000), (1, 150, 2000))],
)
def test_long_and_chat_have_the_lengths_that_other_engines_are_measured_with(
    name: str, prompts: tuple[int, int, int], outputs: tuple[int, int, int]
) -> None:
    workload = Workload.named(name, 2000, 128256)
    for lengths, (least, median, most) in [
        ([len(prompt) for prompt in workload.prompts], prompts),
        (workload.new_tokens, outputs),
    ]:
        assert min(lengths) >= least
        assert max(lengths) <= most
        # Half of the outputs of a chat are short ones; between the two kinds the median is only roughly known.
        assert np.median(lengths) == pytest.approx(median, rel=0.05 if name == "long" else 0.6)
    if name == "long":
        assert np.std(np.log(np.clip(workload.new_tokens, 40, 450))) == pytest.approx(0.47, abs=0.03)
    else:
        assert np.mean([len(prompt) <= 300 for prompt in workload.prompts]) == pytest.approx(0.6, abs=0.03)
    for shape in benchmark.SHAPES:
        assert workload.longest <= benchmark.SHAPES[shape]["max_position_embeddings"]


def test_the_floor_of_experts_counts_those_that_a_token_and_a_step_choose() -> None:
    few = {**benchmark.SHAPES["qwen3-30b-a3b"], "num_hidden_layers": 2, "vocab_size": 64}
    # As many parameters in one dense layer, without a router.
    one, all_of_them = 3 * 2048 * 768, 128 * 3 * 2048 * 768
    free = Ceilings(operations=float("inf"), bytes=float("inf"))
    workload = Workload("own", [[5] * 10, [6] * 20], [1, 3])

    def floor(chosen: int, ceilings: Ceilings) -> float:
        config = transformers.AutoConfig.for_model(**few | {"num_experts_per_tok": chosen})
        return floor_seconds(config, workload, ceilings, 2)

    operations, bytes_read = replace(free, operations=1.0), replace(free, bytes=1.0)
    tokens = 10 + 20 + 1 + 3
    assert floor(128, operations) - floor(8, operations) == 2 * 2 * tokens * 120 * one
    # The first step has two rows, the others one.
    share = 1 - (15 / 16) ** 2 + 2 * (1 / 16)
    spared = floor(128, bytes_read) - floor(8, bytes_read)
    assert spared == pytest.approx(2 * 2 * all_of_them * (3 - share))


class WrongEngine:
    """Answers row 0, cuts row 1 short, fails row 2, forgets row 3, and completes row 4 twice."""

    def __init__(self, spec: EngineSpec, model: Any) -> None:
        self.stats = EngineStats(engine="padded", device="cpu", dtype="float32")

    def generate(self, requests: Iterator[Request]) -> Iterator[Completion]:
        for request in requests:
            tokens = np.zeros(request.max_new_tokens, np.int32)
            if request.id == 1 and request.max_new_tokens > 1:
                yield Completion(1, tokens[:-1], "stop")
            elif request.id == 2:
                fault = RowFault(FaultCode.BAD_LOGITS, "not a number")
                yield Completion(2, tokens[:0], "error", fault)
            elif request.id != 3:
                yield Completion(request.id, tokens, "length")
                if request.id == 4:
                    yield Completion(4, tokens, "length")


def test_rows_that_come_back_wrong_are_named_with_what_is_wrong(monkeypatch) -> None:
    monkeypatch.setitem(benchmark.BUILT_IN, "padded", "test_bench:WrongEngine")
    workload = Workload("own", [[5, 6]] * 5, [3, 4, 5, 6, 7])
    with pytest.raises(EngineError, match="3 of 5 rows came back wrong") as caught:
        bench("tiny", workload, engines=["padded"], device="cpu")
    message = str(caught.value)
    assert (
        "row 2: 1 tokens expected, 0 received, finish reason error, error BAD_LOGITS: not a number" in message
    )
    assert "row 3: 1 tokens expected, no completion" in message
    assert "row 4: 1 tokens expected, 1 received, finish reason length, completed 2 times" in message
    requests = workload.requests(100)
    with pytest.raises(EngineError, match="row 1: 4 tokens expected, 3 received, finish reason stop"):
        benchmark._check("padded", requests, list(WrongEngine(None, None).generate(iter(requests))))


def test_of_many_wrong_rows_a_few_are_named(monkeypatch) -> None:
    requests = Workload("own", [[5]] * 50, [2] * 50).requests(100)
    with pytest.raises(EngineError, match="50 of 50 rows") as caught:
        benchmark._check("paged", requests, [])
    assert str(caught.value).count("no completion") == benchmark.SHOWN_ROWS


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_a_bench_of_a_job_leaves_out_rows_without_a_prompt_and_says_so(
    tmp_path, tiny_llama, monkeypatch, kind
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_job(tmp_path, tiny_llama, engine={"kind": kind}, generation={"max_new_tokens": 4})
    texts = ["x" * 10] * 5 + [
        "a word " * 40,
        None,
        "",
        "z" * 100_000,
        "half",
        *(f"row {i}" for i in range(10)),
    ]
    pq.write_table(pa.table({"text": texts}), tmp_path / "in.parquet")
    (result,) = bench_job(load(path), rows=20)
    assert (result.rows, result.output_tokens) == (17, 68)
    table = format_results([result])
    assert "3 of 20 sampled rows have no prompt and are left out" in table
    for code in ("NULL_PROMPT: 1", "EMPTY_PROMPT: 1", "PROMPT_TOO_LONG: 1"):
        assert code in table


def test_a_bench_of_a_job_with_samples_says_that_it_measures_one_a_row(
    tmp_path, tiny_llama, monkeypatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    sampled = {"max_new_tokens": 4, "samples": 3, "temperature": 1.0}
    job = load(write_job(tmp_path, tiny_llama, engine={"kind": "padded"}, generation=sampled))
    (result,) = bench_job(job, rows=20)
    assert result.output_tokens == 80
    assert "each row is answered once here, and 3 times in a run (generation.samples)" in format_results(
        [result]
    )
