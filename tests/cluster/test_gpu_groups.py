"""An engine of several GPUs: each worker owns a group of them, wherever it runs."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest

import batchrun as library
from batchrun.cluster import local, refuse_unusable
from batchrun.cluster.check import WorkerFacts, find_problem
from batchrun.cluster.kubernetes import kubernetes_spec
from batchrun.cluster.slurm import slurm_options
from batchrun.driver import engines
from batchrun.errors import ClusterError
from batchrun.job.settings import ClusterSettings
from batchrun.output import manifest
from batchrun.storage import Folder
from batchrun.telemetry import record
from jobs import check_complete, environment, load, write_job


def settings(**values: Any) -> ClusterSettings:
    return ClusterSettings(**values)


@pytest.fixture
def visible(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The GPUs of this machine, to be filled in."""
    names: list[str] = []
    for module in (local, engines):
        monkeypatch.setattr(module, "visible_gpus", lambda: list(names))
    return names


@pytest.mark.parametrize(
    ("names", "each", "groups"),
    [
        (["0", "1", "2", "3"], 2, ["0,1", "2,3"]),
        (["3", "1", "2", "0"], 4, ["3,1,2,0"]),
        (["GPU-aa", "MIG-bb", "GPU-cc", "GPU-dd", "GPU-ee"], 2, ["GPU-aa,MIG-bb", "GPU-cc,GPU-dd"]),
        (["0", "1"], 1, ["0", "1"]),
    ],
)
def test_workers_of_a_machine_see_a_group_each_in_the_order_and_by_the_names_of_the_machine(
    visible: list[str], names: list[str], each: int, groups: list[str]
) -> None:
    visible += names
    assert [env["CUDA_VISIBLE_DEVICES"] for env in local.environments(settings(), each)] == groups


def test_ranks_on_a_machine_without_gpus_are_one_workers(visible: list[str]) -> None:
    assert local.environments(settings(), 2) == [{}]
    assert local.environments(settings(workers=3), 2) == [{}, {}, {}]


def test_gpus_that_are_too_few_for_one_more_engine_are_told_of(
    visible: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    visible += ["0", "1", "2"]
    caplog.set_level("WARNING", logger=local.log.name)
    from distributed import Security

    found = local._workers(settings(), Security(), (), 2)
    assert [worker["options"]["env"]["CUDA_VISIBLE_DEVICES"] for worker in found.values()] == ["0,1"]
    assert "1 GPU of this machine unused: engine.gpus is 2" in caplog.text


def test_more_gpus_than_the_machine_has_are_refused_before_anything_starts(visible: list[str]) -> None:
    visible += ["0", "1"]
    with pytest.raises(ClusterError, match="4 GPUs for one engine asked for, 2 GPUs visible") as caught:
        refuse_unusable(settings(), 4)
    assert caught.value.where == "engine.gpus"
    with pytest.raises(ClusterError, match="2 workers asked for, 2 GPUs visible") as caught:
        refuse_unusable(settings(workers=2), 2)
    assert caught.value.fix == "a worker takes 2 (engine.gpus)"


def test_an_engine_stands_by_for_each_group(
    visible: list[str], tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Standby:
        def __init__(self, kind: str, env: dict[str, str]) -> None:
            self.env = env

        def __enter__(self) -> Standby:
            return self

        def __exit__(self, *_: object) -> None:
            pass

    monkeypatch.setattr(engines, "Standby", Standby)
    visible += ["0", "1", "2", "3", "4"]
    job = write_job(tmp_path, tiny_llama, engine={"kind": "paged"})
    for gpus, groups in (("2", ["0,1", "2,3"]), ("4", ["0,1,2,3"]), ("auto", []), ("8", [])):
        with engines.standing_by(load(job, f"engine.gpus={gpus}")) as standby:
            assert [one.env["CUDA_VISIBLE_DEVICES"] for one in standby] == groups


def test_a_slurm_job_asks_for_the_engines_gpus_unless_the_job_file_does(
    caplog: pytest.LogCaptureFixture,
) -> None:
    import dask_jobqueue

    assert "job_extra_directives" not in slurm_options(settings(slurm={})), "as ever"
    with dask_jobqueue.SLURMCluster(**slurm_options(settings(slurm={}), 2)) as cluster:
        assert "#SBATCH --gres=gpu:2" in cluster.job_script().splitlines()
    for own in ("--gres=gpu:h100:2", "--gpus-per-task=2", "-G 2", "--gres=tmp:1,gpu:2", "--gpus=h100:2"):
        options = slurm_options(settings(slurm={"job_extra_directives": [own]}), 2)
        assert options["job_extra_directives"] == [own]
    assert not caplog.records
    with pytest.raises(ClusterError, match=r"asks for 1 of the 2 GPUs that engine.gpus gives a worker"):
        refuse_unusable(settings(slurm={"job_extra_directives": ["--gres=gpu:1"]}), 2)
    caplog.set_level(logging.WARNING)
    slurm_options(settings(slurm={"job_extra_directives": ["--gpus=8"]}), 2)
    assert "6 of the 8 GPUs of each worker unused: engine.gpus is 2" in caplog.text


def test_a_pod_is_limited_to_the_engines_gpus_unless_the_job_file_limits_it() -> None:
    def container(gpus: int, **resources: Any) -> dict[str, Any]:
        spec = kubernetes_spec(settings(kubernetes={"image": "one", "resources": resources}), gpus)
        pod = spec["spec"]["worker"]["spec"]
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x"}, "spec": pod}, "1.27", strict=True
        )
        assert "resources" not in spec["spec"]["scheduler"]["spec"]["containers"][0]
        found: dict[str, Any] = pod["containers"][0]["resources"]
        return found

    assert container(1) == {}, "as ever"
    assert container(2, limits={"memory": "64Gi"}) == {"limits": {"memory": "64Gi", "nvidia.com/gpu": 2}}
    assert container(2, limits={"nvidia.com/gpu": "2"}) == {"limits": {"nvidia.com/gpu": "2"}}
    with pytest.raises(ClusterError, match=r"nvidia.com/gpu asks for 1 of the 4 GPUs"):
        kubernetes_spec(
            settings(kubernetes={"image": "one", "resources": {"limits": {"nvidia.com/gpu": 1}}}), 4
        )


def test_workers_by_hand_with_too_few_gpus_or_with_anothers_are_found() -> None:
    def worker(*gpus: str) -> WorkerFacts:
        return WorkerFacts(library.__version__, 2, False, tuple(f"boot host {gpu}" for gpu in gpus))

    assert find_problem({"a": worker("0", "1"), "b": worker("2", "3")}, 2, 2) is None
    assert find_problem({"a": worker(), "b": worker()}, 2, 2) is None, "ranks on CPUs share a machine"
    what, where, fix = find_problem({"a": worker("0", "1"), "b": worker("2")}, 2, 2) or ("", "", "")
    assert (what, where) == ("the worker may use 1 GPU, engine.gpus says 2", "b")
    assert "CUDA_VISIBLE_DEVICES=0,1" in fix
    what, where, _ = find_problem({"a": worker("0", "1"), "b": worker("3", "1")}, 2, 2) or ("", "", "")
    assert (what, where) == ("the worker uses the same GPU as a", "b")
    assert find_problem({"a": worker("0", "1"), "b": worker("1", "0")}, 2, 1) is None, "each takes its first"


def test_a_run_counts_the_gpus_of_its_engines_which_see_them_and_no_others(
    visible: list[str], tmp_path: Path, tiny_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    visible += ["0", "MIG-b", "7", "3", "9"]
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    job = write_job(
        tmp_path,
        tiny_llama,
        engine={"kind": "faulty_engines:InstantOnGpus", "gpus": 2},
        cluster={"price_per_gpu_hour": 3600.0},
    )
    result = library.run(load(job))
    assert check_complete(tmp_path / "out", 60)
    seen = {note for stats in result.engines for note in stats.notes}
    assert seen == {"2 GPUs: 0,MIG-b", "2 GPUs: 7,3"}
    folder = Folder(str(tmp_path / "out"))
    (run,) = record.read_all(folder)
    assert (run.workers, run.gpus_per_worker, run.gpus) == (2, 2, 4)
    assert run.gpu_seconds == pytest.approx(2 * run.worker_seconds)
    assert run.cost == pytest.approx(run.gpu_seconds), "a GPU second costs 1"
    assert result.gpu_seconds == pytest.approx(run.gpu_seconds, rel=0.2)
    assert result.to_json()["tokens_per_gpu_second"] == pytest.approx(
        result.counts.tokens / result.gpu_seconds
    )
    # How many GPUs an engine has decides no answer: the same output goes on.
    assert manifest.read(folder) is not None
    assert library.run(load(job, "engine.gpus=1")).requests == 0
