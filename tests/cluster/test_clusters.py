"""Where a job may run: workers started by hand, Slurm behind stand-ins for its commands, Kubernetes by its manifest."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from distributed import KilledWorker
from fleet import fleet, wait_until
from pydantic import ValidationError

import batchrun as library
from batchrun.cluster import connect
from batchrun.cluster.check import WorkerFacts, check_workers, find_problem
from batchrun.cluster.config import DASK_CONFIG, optional, worker_environment
from batchrun.cluster.kubernetes import kubernetes_spec
from batchrun.cluster.slurm import slurm_options
from batchrun.errors import ClusterError, ExitCode
from batchrun.job.settings import ClusterSettings
from jobs import batchrun, check_complete, environment, load, write_job

ROWS = 60

# Stands in for Slurm: a job is a background process of this machine, and scancel ends its group.
SBATCH = """#!/bin/sh
grep -q '^#SBATCH -p nowhere$' "$1" && { echo 'sbatch: error: invalid partition specified: nowhere' >&2; exit 1; }
cp "$1" "$SLURM_SPOOL/last.sh"
setsid sh -c "sh $SLURM_SPOOL/last.sh" > "$SLURM_SPOOL/log" 2>&1 &
echo $! >> "$SLURM_SPOOL/jobs"
echo "Submitted batch job $!"
"""
SCANCEL = """#!/bin/sh
kill -TERM -- "-$1"
echo "$1" >> "$SLURM_SPOOL/cancelled"
"""


def test_a_cluster_that_ends_moves_nothing_in_the_path_that_other_threads_import_by():
    with connect(ClusterSettings()):
        path, folders = sys.path, [*sys.path]
        assert not any("dask-scratch-space" in folder for folder in folders)
    assert sys.path is path
    assert path == folders


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A machine with sbatch and scancel; gives the folder in which they note what they did."""
    spool = tmp_path / "slurm"
    (spool / "bin").mkdir(parents=True)
    for name, text in (("sbatch", SBATCH), ("scancel", SCANCEL)):
        (spool / "bin" / name).write_text(text)
        (spool / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{spool / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_SPOOL", str(spool))
    yield spool
    for job in (spool / "jobs").read_text().split() if (spool / "jobs").exists() else []:
        subprocess.run(["pkill", "-KILL", "-g", job], check=False)


def settings(**values: Any) -> ClusterSettings:
    return ClusterSettings(**values)


def test_a_local_worker_that_stays_away_for_long_comes_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dask takes its nanny away then: 15 seconds of one death after the other would leave a run without workers."""
    monkeypatch.setitem(DASK_CONFIG, "distributed.deploy.lost-worker-timeout", "10ms")
    with connect(settings(workers=1)) as client:
        first = set(client.scheduler_info()["workers"])
        for worker in client.run(os.getpid).values():
            os.kill(worker, signal.SIGKILL)
        wait_until(lambda: set(client.scheduler_info()["workers"]) - first, "no worker came again", 90)

        def answers() -> bool:
            # Ten milliseconds are so short that on a busy machine the new one may be taken away once more.
            with contextlib.suppress(KilledWorker):
                return client.submit(int, "7", pure=False).result(timeout=60) == 7
            return False

        wait_until(answers, "no worker that came stayed", 90)


def test_a_job_runs_on_at_most_one_kind_of_cluster() -> None:
    with pytest.raises(ValidationError, match="at most one"):
        settings(address="tcp://x:1", slurm={})


def test_workers_that_cannot_do_the_job_are_named_with_the_fix_before_anything_is_written(
    tmp_path: Path, tiny_llama: Path
) -> None:
    job = write_job(tmp_path, tiny_llama)
    old = tmp_path / "old"
    (old / "batchrun").mkdir(parents=True)
    (old / "batchrun" / "__init__.py").write_text("__version__ = '0.0.1'\n")
    with fleet(tmp_path / "logs") as one:
        wide = one.worker("127.0.0.1", "--nthreads", "9")
        one.wait_for(1)
        with pytest.raises(ClusterError, match="9 partitions at once") as caught:
            library.run(load(job, f"cluster.address={one.address}"))
        assert caught.value.where.startswith("tcp://127.0.0.1:")
        assert caught.value.fix == "start it with --nthreads 2, or set cluster.slots: 9"
        wide.terminate()
        wide.wait()
        one.worker("127.0.0.1", PYTHONPATH=str(old))
        one.wait_for(1)
        with pytest.raises(ClusterError, match=r"cannot load batchrun.*install the same wheel"):
            library.run(load(job, f"cluster.address={one.address}"))
    assert not (tmp_path / "out" / "data").exists()


def test_two_workers_on_one_gpu_and_another_version_are_found() -> None:
    good = WorkerFacts(library.__version__, 2, False, ())
    gpu = WorkerFacts(library.__version__, 2, False, ("boot host 0",))
    assert find_problem({"a": good, "b": good}, 2) is None, "without a GPU many workers may share a machine"
    what, where, fix = find_problem({"a": gpu, "b": gpu}, 2) or ("", "", "")
    assert (where, "same GPU as a" in what, "CUDA_VISIBLE_DEVICES" in fix) == ("b", True, True)
    what, where, _ = find_problem({"a": WorkerFacts("0.0.9", 2, False, ())}, 2) or ("", "", "")
    assert "batchrun 0.0.9" in what


def test_a_profiler_and_missing_workers_are_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from distributed import Client

    caplog.set_level("WARNING")  # Dask turns pytest's own handlers off while a cluster is up
    with fleet(tmp_path / "logs") as one, Client(one.address, set_as_default=False) as client:
        check_workers(client, 2)
        assert "waits for the first one" in caplog.text
        one.worker(DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED="True")
        client.wait_for_workers(1, timeout=180)
        check_workers(client, 2)
        assert "PROFILE__ENABLED=False" in caplog.text


def test_a_slurm_script_books_what_the_job_says_and_starts_one_worker_with_its_settings() -> None:
    import dask_jobqueue

    own = {
        "queue": "gpu",
        "account": "team",
        "walltime": "08:00:00",
        "memory": "64GiB",
        "job_cpu": 8,
        "job_extra_directives": ["--gres=gpu:1"],
        "job_script_prologue": ["module load cuda"],
    }
    options = slurm_options(settings(slots=3, slurm=own))
    with dask_jobqueue.SLURMCluster(**options) as cluster:
        script = cluster.job_script()
    lines = script.splitlines()
    for line in ("-p gpu", "-A team", "-t 08:00:00", "--cpus-per-task=8", "--mem=64G", "--gres=gpu:1"):
        assert f"#SBATCH {line}" in lines, script
    assert lines.index("module load cuda") < lines.index(
        "export DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False"
    )
    worker = next(line for line in lines if "distributed.cli.dask_worker" in line)
    assert "--nthreads 3" in worker
    assert "--nanny" in worker
    assert subprocess.run(["bash", "-n"], input=script, text=True, check=False).returncode == 0


def test_a_job_runs_on_slurm_and_takes_its_workers_away_afterwards(
    tmp_path: Path, tiny_llama: Path, slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", environment()["PYTHONPATH"])
    local = {"scheduler_options": {"host": "127.0.0.1"}, "memory": "2GiB", "python": sys.executable}
    job = write_job(tmp_path, tiny_llama, cluster={"workers": 2, "slurm": local})
    assert library.run(load(job)).requests == ROWS
    check_complete(tmp_path / "out", ROWS)
    jobs = (slurm / "jobs").read_text().split()
    assert len(jobs) == 2
    wait_until(lambda: (slurm / "cancelled").exists() and
               set((slurm / "cancelled").read_text().split()) == set(jobs), "a Slurm job is left over")  # fmt: skip


def test_a_slurm_job_that_ends_before_the_run_is_submitted_again(
    slurm: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("batchrun.cluster.slurm.RESUBMIT", 1.0)
    monkeypatch.setitem(library.cluster.DASK_CONFIG, "distributed.deploy.lost-worker-timeout", "1s")  # type: ignore[attr-defined]
    local = {"scheduler_options": {"host": "127.0.0.1"}, "memory": "2GiB"}
    with connect(settings(slurm=local)) as client:
        client.wait_for_workers(1, timeout=180)
        first = (slurm / "jobs").read_text().split()
        subprocess.run(["pkill", "-KILL", "-g", first[0]], check=True)
        wait_until(lambda: len((slurm / "jobs").read_text().split()) == 2, "not submitted again")
        client.wait_for_workers(1, timeout=180)


def test_what_sbatch_refuses_is_said_in_its_words(slurm: Path) -> None:
    with (
        pytest.raises(ClusterError, match="invalid partition specified: nowhere"),
        connect(settings(slurm={"queue": "nowhere"})),
    ):
        raise AssertionError("a cluster was started")
    with pytest.raises(ClusterError, match=r"cluster\.slurm"), connect(settings(slurm={"qeue": "gpu"})):
        raise AssertionError("a cluster was started")


def test_without_slurm_the_error_names_the_key_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ClusterError, match=r"cluster\.slurm: no sbatch"), connect(settings(slurm={})):
        raise AssertionError("a cluster was started")


def test_kubernetes_pods_are_valid_and_only_workers_take_a_gpu() -> None:
    own = {
        "image": "registry.example/batchrun:0.1.0",
        "resources": {"limits": {"nvidia.com/gpu": 1, "memory": "64Gi"}},
        "env": {"HF_HOME": "/models"},
        "pod": {
            "serviceAccountName": "lake",
            "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
        },
    }
    spec = kubernetes_spec(settings(workers=4, kubernetes=own))
    assert spec["spec"]["worker"]["replicas"] == 4
    pods = {kind: spec["spec"][kind]["spec"] for kind in ("worker", "scheduler")}
    for kind, pod in pods.items():
        document = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": kind}, "spec": pod}
        kubernetes_validate.validate(document, "1.32", strict=True)
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s"}}
    kubernetes_validate.validate(
        {**service, "spec": spec["spec"]["scheduler"]["service"]}, "1.32", strict=True
    )
    worker, scheduler = (pods[kind]["containers"][0] for kind in ("worker", "scheduler"))
    assert worker["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "resources" not in scheduler
    names = {entry["name"]: entry["value"] for entry in worker["env"]}
    assert names["HF_HOME"] == "/models"
    assert names.items() >= worker_environment().items()


def test_the_commands_in_the_pods_are_commands_that_dask_has() -> None:
    spec = kubernetes_spec(settings(kubernetes={"image": "x"}))["spec"]
    for kind in ("worker", "scheduler"):
        words = spec[kind]["spec"]["containers"][0]["args"]
        assert words[0] == "dask"
        ran = subprocess.run(
            [sys.executable, "-m", *words, "--help"], capture_output=True, text=True, check=False
        )
        assert ran.returncode == 0, ran.stderr
        for option in (word for word in words if word.startswith("--")):
            assert option in ran.stdout


def test_an_unknown_kubernetes_key_and_a_missing_image_are_refused() -> None:
    with pytest.raises(ClusterError, match="unknown gpus"):
        kubernetes_spec(settings(kubernetes={"image": "x", "gpus": 1}))
    with pytest.raises(ClusterError, match="no image"):
        kubernetes_spec(settings(kubernetes={}))


@pytest.mark.parametrize(
    ("module", "section", "package"),
    [
        ("dask_jobqueue", "slurm", "dask-jobqueue"),
        ("dask_kubernetes.operator", "kubernetes", "dask-kubernetes"),
    ],
)
def test_a_clusters_missing_library_is_the_one_to_install(
    module: str, section: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ClusterError) as caught:
        optional(module, section)
    assert (caught.value.where, caught.value.fix) == (f"cluster.{section}", f"pip install {package}")
    assert package in caught.value.what


def test_without_a_kubernetes_cluster_the_error_is_one_line(tmp_path: Path, tiny_llama: Path) -> None:
    job = write_job(tmp_path, tiny_llama, cluster={"kubernetes": {"image": "x"}})
    code, _, err = batchrun("run", str(job), KUBECONFIG=str(tmp_path / "none"), HOME=str(tmp_path))
    assert code == ExitCode.REFUSED
    assert err.startswith("error: cluster.kubernetes: ")
    assert err.count("\n") == 1, err


def test_every_setting_reaches_workers_that_others_start(tmp_path: Path) -> None:
    import dask

    from batchrun.cluster.config import DASK_CONFIG

    shown = "import dask, json, sys; print(json.dumps({k: dask.config.get(k) for k in sys.argv[1:]}))"
    keys = [key for key in DASK_CONFIG if "environ" not in key]
    ran = subprocess.run(
        [sys.executable, "-c", "import distributed; " + shown, *keys],
        env={**os.environ, **worker_environment()}, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert json.loads(ran.stdout) == {key: DASK_CONFIG[key] for key in keys}
    assert dask.config.get("distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS") == 1
