"""How many GPUs an engine takes: what the job says, or as few as hold the model and enough rows; refused in a line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_models import model_folder

from batchrun.cluster import local
from batchrun.commands import plan as plan_command
from batchrun.commands.plan import lines, preview
from batchrun.driver import gpus
from batchrun.driver.gpus import smallest
from batchrun.driver.prepare import look, prepare, row_tokens, settle
from batchrun.errors import BatchrunError, ClusterError, JobError
from batchrun.estimate import records
from batchrun.estimate.cost import Observation, Throughput
from batchrun.model.memory import ModelMemory, model_memory
from batchrun.telemetry.gpu import Gpu
from jobs import load, write_job

HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4}


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Gives this machine so many GPUs of so many bytes."""

    def set_up(count: int, memory: float) -> None:
        for module in (gpus, local, plan_command):
            monkeypatch.setattr(module, "visible_gpus", lambda: [str(i) for i in range(count)])
        monkeypatch.setattr(gpus, "gpu_now", lambda: Gpu("H100", 0.0, 0, int(memory)) if count else None)
        monkeypatch.setattr(records, "device_name", lambda: "H100")

    return set_up


@pytest.fixture
def job(tmp_path: Path, tiny_llama: Path) -> Path:
    return write_job(tmp_path, tiny_llama, engine={"kind": "paged"}, generation={"max_new_tokens": 32})


def needs(path: Path) -> tuple[ModelMemory, float]:
    """The job's model, and the bytes that 64 rows take of one GPU."""
    prepared = prepare(load(path))
    found = model_memory(prepared.model.path, prepared.model.used, "auto")
    assert found is not None
    return found, 64 * found.token * row_tokens(prepared)


def test_auto_takes_the_smallest_power_of_two_at_which_the_weights_and_64_rows_fit() -> None:
    memory = ModelMemory(
        weights=1000, fp8_weights=600, token=10, fp8_token=5, whole=200, heads=8, key_heads=8
    )
    cache = 64 * 10 * 1.0
    for count, each in ((1, 1000 + cache), (2, 600 + cache / 2), (4, 400 + cache / 4), (8, 300 + cache / 8)):
        assert smallest(memory, each, 1.0, False, 8) == count
        assert smallest(memory, each - 1, 1.0, False, 8) == (2 * count if count < 8 else None)
    assert smallest(memory, 600 + cache, 1.0, True, 8) == 1, "of weights in fp8 fewer hold them"
    assert smallest(memory, 400 + cache / 4, 1.0, False, 2) is None, "a machine has so many"
    uneven = ModelMemory(weights=1000, fp8_weights=600, token=10, fp8_token=5, heads=12, key_heads=3)
    assert smallest(uneven, 999, 1.0, False, 8) is None, "three key heads are not shared out to two"


def test_auto_counts_the_jobs_own_model_rows_and_memory(machine: Any, job: Path) -> None:
    memory, cache = needs(job)
    fraction = load(job).engine.memory_fraction
    machine(2, 1.001 * (memory.weights + cache) / fraction)
    assert prepare(load(job, "engine.gpus=auto")).gpus == 1
    machine(2, 1.001 * (memory.weights_of(2, False) + cache / 2) / fraction)
    prepared = prepare(load(job, "engine.gpus=auto"))
    assert prepared.gpus == prepared.codec.engine.gpus == prepared.job.engine.gpus == 2
    assert "gpus" not in prepared.codec.engine.options
    assert prepare(load(job)).identity.job_hash == prepared.identity.job_hash, "it decides no answer"
    machine(2, 0.9 * (memory.weights_of(2, False) + cache / 2) / fraction)
    with pytest.raises(JobError, match=r"64 rows of .* tokens do not fit on 2 GPUs"):
        prepare(load(job, "engine.gpus=auto"))
    machine(0, 0)
    assert prepare(load(job, "engine.gpus=auto")).gpus == 1, "a CPU needs no second one"


def test_auto_where_sizes_are_not_known_is_refused_in_a_line(machine: Any, job: Path, tmp_path: Path) -> None:
    machine(2, 1 << 30)
    with pytest.raises(JobError, match="memory the workers' GPUs have is not known") as caught:
        prepare(load(job, "engine.gpus=auto", "cluster.slurm={}"))
    assert caught.value.fix == "set engine.gpus to a number, 1 where they have 80 GiB"
    prepared = look(load(job, "engine.gpus=auto"))
    object.__setattr__(prepared.model, "used", ("pytorch_model.bin",))
    with pytest.raises(JobError, match="sizes are not known"):
        settle(prepared)


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["engine.gpus=4"], "4 GPUs cannot share out 4 attention heads and 2 of keys and values"),
        (["engine.gpus=3"], "3 GPUs cannot share out"),
        (["engine.gpus=2", "engine.kind=padded"], "the padded engine runs on one GPU"),
        (["engine.gpus=0"], "give a number of GPUs, 1 or more, or auto"),
        (["engine.gpus=some"], "give a number of GPUs, 1 or more, or auto"),
    ],
)
def test_what_cannot_be_is_refused_while_planning(job: Path, overrides: list[str], what: str) -> None:
    with pytest.raises(BatchrunError, match=what) as caught:
        prepare(load(job, *overrides))
    assert "\n" not in str(caught.value)


def test_heads_of_a_multimodal_config_are_those_of_its_text() -> None:
    from batchrun.model.memory import attention_heads

    assert attention_heads({"text_config": HEADS}) == attention_heads(HEADS) == (12, 4)
    assert attention_heads({"num_attention_heads": 6}) == (6, 6)
    assert attention_heads({"n_head": 6}) is None
    folder = model_folder("llama")
    config = json.loads((Path(folder) / "config.json").read_text())
    assert attention_heads(config) == (config["num_attention_heads"], config["num_key_value_heads"])


def test_a_plan_says_what_auto_took_why_and_what_each_gpu_holds(machine: Any, job: Path) -> None:
    memory, cache = needs(job)
    budget = 1.001 * (memory.weights_of(2, False) + cache / 2)
    machine(2, budget / load(job).engine.memory_fraction)
    found = preview(load(job, "engine.gpus=auto"))
    held = found["memory"]
    assert (held["gpus"], held["chosen"], held["each_weights"]) == (2, True, memory.weights_of(2, False))
    assert held["each_cache"] == pytest.approx(budget - held["each_weights"], abs=2)
    assert held["smaller_rows"] < 64 <= held["rows"] * 1.2
    text = "\n".join(map(str, lines(found)))
    assert (
        "engine.gpus: auto takes 2, the smallest power of two at which 64 rows fit; 1 GPU would hold" in text
    )
    assert "each holds" in text
    assert "at once on 2 GPUs (H100)" in text
    text = "\n".join(map(str, lines(preview(load(job)))))
    assert "fewer than 64 rows at once leave a GPU idle: engine.gpus: 2 would hold them" in text


def test_a_plan_for_eight_gpus_shares_them_out_and_bills_all_of_them(
    machine: Any, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine(2, 1 << 40)
    two = load(job, "engine.gpus=2", "cluster.price_per_gpu_hour=10")
    one = load(job, "cluster.price_per_gpu_hour=10")
    prepared = prepare(two)
    seen = [Observation(10, 1000, 100, 5.0), Observation(10, 100, 1000, 9.0)]
    for count in (2, 1):
        known = Throughput("a trial", "paged", "H100", seen, True, 1.0, count)
        records.remember(records.model_key(prepared), "paged", prepared.identity.job_hash, known)
    found = preview(two, gpus=9)
    told = found["estimate"]
    assert (told["workers"], told["gpus_per_worker"], found["unused_gpus"]) == (4, 2, 1)
    assert told["gpu_hours"]["likely"] == pytest.approx(2 * told["worker_hours"]["likely"], rel=1e-4)
    assert told["cost"]["likely"] == pytest.approx(10 * told["gpu_hours"]["likely"], rel=1e-4)
    text = "\n".join(map(str, lines(found)))
    assert "on 4 workers of 2 GPUs" in text
    assert "1 GPU unused: an engine takes 2 (engine.gpus)" in text
    told = preview(one, gpus=8)["estimate"]
    assert (told["workers"], told["gpus_per_worker"]) == (8, 1)
    with pytest.raises(JobError, match=r"one engine takes 2 GPUs"):
        preview(two, gpus=1)
    machine(1, 1 << 40)
    with pytest.raises(ClusterError, match="2 GPUs for one engine asked for, 1 GPU visible"):
        preview(two)
    assert preview(two, gpus=8)["estimate"]["workers"] == 4, "for a machine that is not this one"


def test_what_one_gpu_did_is_no_estimate_for_an_engine_of_two(
    machine: Any, job: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    machine(2, 1 << 40)
    prepared = prepare(load(job))
    known = Throughput("a trial", "paged", "H100", [Observation(10, 1000, 100, 5.0)], True)
    records.remember(records.model_key(prepared), "paged", prepared.identity.job_hash, known)
    assert preview(load(job))["estimate"] is not None
    assert preview(load(job, "engine.gpus=2"))["estimate"] is None
