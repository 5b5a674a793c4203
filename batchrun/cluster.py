"""A Dask client for the job: local workers, one per GPU or one on a CPU, or workers elsewhere.

Elsewhere is a running scheduler's address, jobs on Slurm (dask-jobqueue) or pods on Kubernetes (dask-kubernetes).
"""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import shutil
import socket
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import dask
from distributed import Client, Nanny, Scheduler, SpecCluster, Status, Worker
from tornado.ioloop import PeriodicCallback

import batchrun
from batchrun.errors import ClusterError
from batchrun.job import ClusterSettings

log = logging.getLogger(__name__)

# Set on purpose, each for a reason that cost somebody a night:
DASK_CONFIG = {
    # The engine is a child of the worker, and a daemonic process cannot have children.
    "distributed.worker.daemon": False,
    # A lost worker is the driver's to judge, by what its attempt left in storage.
    "distributed.scheduler.allowed-failures": 0,
    # The worker itself only reads, tokenizes and writes; torch runs in the engine's process with its own threads.
    "distributed.nanny.pre-spawn-environ.OMP_NUM_THREADS": 1,
    # Partitions in flight are few and equal, so work stealing only moves a started one's key about.
    "distributed.scheduler.work-stealing": False,
    # Dask's profiler calls sys._current_frames() a hundred times a second, which can deadlock a process that is
    # importing or collecting garbage in another thread (CPython gh-106883): a worker that hangs for ever, alive.
    "distributed.worker.profile.enabled": False,
    # Long GIL-holding calls (a large Parquet footer, a template) are no reason to drop a connection.
    "distributed.comm.timeouts.connect": "60s",
    "distributed.comm.timeouts.tcp": "120s",
    "distributed.admin.tick.limit": "30s",
}


@contextmanager
def connect(settings: ClusterSettings) -> Iterator[Client]:
    """Yields a client of the cluster that the job asks for; a local cluster ends with the context.

    Raises:
        ClusterError: no scheduler answers at the address.
    """
    # That a worker left, came or closed a connection is the driver's news to tell, in the run's own words.
    logging.getLogger("distributed").setLevel(logging.CRITICAL)
    with dask.config.set(DASK_CONFIG):
        if settings.address is not None:
            try:
                client = Client(settings.address, timeout="15s", set_as_default=False)
            except (OSError, TimeoutError, ValueError) as error:
                raise ClusterError(
                    f"no Dask scheduler answers ({type(error).__name__})",
                    settings.address,
                    "start one with `dask scheduler`, or leave cluster.address out for a local cluster",
                ) from None
            with client:
                check_workers(client, settings.slots)
                yield client
            return
        with _start(settings) as cluster, Client(cluster, set_as_default=False) as client:
            yield client


def _start(settings: ClusterSettings) -> AbstractContextManager[Any]:
    if settings.slurm is not None:
        return _slurm(settings)
    if settings.kubernetes is not None:
        return _kubernetes(settings)
    return _local(settings)


def _local(settings: ClusterSettings) -> SpecCluster:
    return SpecCluster(
        workers=_local_workers(settings),
        scheduler={
            "cls": Scheduler,
            "options": {
                "dashboard": False,
                "dashboard_address": "127.0.0.1:0",
                "host": "127.0.0.1",
                "port": 0,
            },
        },
        silence_logs=logging.CRITICAL,
    )


def _local_workers(settings: ClusterSettings) -> dict[int, dict[str, Any]]:
    gpus = visible_gpus()
    count = settings.workers or max(1, len(gpus))
    if gpus and count > len(gpus):
        raise ClusterError(
            f"{count} workers asked for, {len(gpus)} GPUs visible",
            "cluster.workers",
            "a GPU takes one worker",
        )
    workers = {}
    for i in range(count):
        env = {"CUDA_VISIBLE_DEVICES": gpus[i]} if gpus else {}
        options = {
            "nthreads": settings.slots,
            "memory_limit": settings.memory_limit,
            "host": "127.0.0.1",
            "dashboard": False,
            "dashboard_address": "127.0.0.1:0",
            "silence_logs": logging.CRITICAL,
            "env": env,
        }
        workers[i] = {"cls": Nanny, "options": options}
    return workers


def dashboard(client: Client) -> str | None:
    """The address of Dask's own dashboard, where the scheduler serves one that can be reached from here."""
    if "dashboard" not in client.scheduler_info(n_workers=0)["services"]:
        return None
    link: str = client.dashboard_link
    try:
        urlopen(link, timeout=2).close()
    except OSError:  # the port is named even where no dashboard was asked for
        return None
    return link


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as values for CUDA_VISIBLE_DEVICES; empty on a machine without one."""
    import torch  # heavy, and only a local cluster needs to know

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # asks the driver library: takes no memory on any GPU
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]


# Seconds between two looks at whether a Slurm job has to be submitted again, after a preemption or its time limit.
RESUBMIT = 30.0
# Seconds that the scheduler's pod has to come up: a node may have to pull an image of gigabytes first.
SCHEDULER_POD = 900


@contextmanager
def _slurm(settings: ClusterSettings) -> Iterator[Any]:
    """As many one-worker Slurm jobs as the job asks for; those that end before the run are submitted again."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "no sbatch command here", "cluster.slurm", "start the run on a machine that submits jobs"
        )
    module = _optional("dask_jobqueue", "slurm")
    jobs = settings.workers or 1
    try:
        cluster = module.SLURMCluster(**slurm_options(settings), silence_logs=logging.CRITICAL)
    except (TypeError, ValueError) as error:
        raise ClusterError(_first_line(error), "cluster.slurm", "options are those of SLURMCluster") from None
    with cluster:

        async def submitted() -> None:
            await cluster
            # Where sbatch failed, this tries once more and raises what it said; the line above swallows it.
            await asyncio.gather(*cluster.workers.values())

        cluster.scale(jobs)
        try:
            cluster.sync(submitted)
        except RuntimeError as error:
            for job in cluster.workers.values():
                job.status = Status.failed  # a job left as created makes closing the cluster fail
            reason = " ".join(str(error).partition("stderr:")[2].split()) or _first_line(error)
            raise ClusterError(
                f"sbatch refused ({reason})", "cluster.slurm", "try the options with sbatch"
            ) from None
        again = PeriodicCallback(lambda: cluster.scale(jobs), RESUBMIT * 1000)
        cluster.loop.add_callback(again.start)
        try:
            yield cluster
        finally:
            cluster.loop.add_callback(again.stop)


def slurm_options(settings: ClusterSettings) -> dict[str, Any]:
    """Options of dask-jobqueue's SLURMCluster: the job's own, and those that batchrun needs.

    One worker process per Slurm job, with as many threads as it has slots; `job_cpu` books more cores.
    """
    options = dict(settings.slurm or {})
    exports = [f"export {name}={value}" for name, value in worker_environment().items()]
    return {
        "memory": "16GiB",
        **options,
        "cores": settings.slots,
        "processes": 1,
        "job_script_prologue": [*options.get("job_script_prologue", []), *exports],
        "worker_extra_args": [*options.get("worker_extra_args", []), "--no-dashboard"],
        "scheduler_options": {"dashboard_address": ":0", **options.get("scheduler_options", {})},
    }


@contextmanager
def _kubernetes(settings: ClusterSettings) -> Iterator[Any]:
    """Scheduler and workers as pods, by the Dask operator (which has to be installed in the cluster)."""
    module = _optional("dask_kubernetes.operator", "kubernetes")
    spec, namespace = kubernetes_spec(settings), (settings.kubernetes or {}).get("namespace")
    try:
        # Asked first: a KubeCluster that finds nobody prints a traceback of its own when the process ends.
        importlib.import_module("kr8s").api().version()
        cluster = module.KubeCluster(
            custom_cluster_spec=spec, namespace=namespace, resource_timeout=SCHEDULER_POD, quiet=True
        )
    except Exception as error:  # kr8s, httpx and the operator's own: all mean that there is no cluster
        fix = "check kubectl's context and that the Dask operator is installed"
        what = f"{type(error).__name__}: {_first_line(error)}"
        raise ClusterError(what, "cluster.kubernetes", fix) from None
    with cluster:
        yield cluster


def kubernetes_spec(settings: ClusterSettings) -> dict[str, Any]:
    """The DaskCluster resource (kubernetes.dask.org/v1) for the Dask operator.

    Written out here, since dask-kubernetes' own generator gives the scheduler the workers' resources too, so a GPU,
    and starts both by commands that Dask has no more.

    Raises:
        ClusterError: a key that is not known, or no image.
    """
    options = dict(settings.kubernetes or {})
    name = options.pop("name", f"batchrun-{uuid.uuid4().hex[:8]}")
    image, env = options.pop("image", None), options.pop("env", {})
    resources, pod = options.pop("resources", {}), options.pop("pod", {})
    options.pop("namespace", None)
    if options or image is None:
        what = f"unknown {', '.join(options)}" if options else "no image"
        known = "image, name, namespace, resources, env, pod"
        raise ClusterError(what, "cluster.kubernetes", f"it takes {known}; docker/ builds an image")
    variables = [{"name": key, "value": str(value)} for key, value in {**worker_environment(), **env}.items()]
    threads = ["--nthreads", str(settings.slots)]
    worker = {
        "name": "worker",
        "image": image,
        "args": ["dask", "worker", "--name", "$(DASK_WORKER_NAME)", *threads, "--no-dashboard"],
        "env": variables,
        "resources": resources,
    }
    probe = {"httpGet": {"port": "http-dashboard", "path": "/health"}, "periodSeconds": 10}
    scheduler = {
        "name": "scheduler",
        "image": image,
        "args": ["dask", "scheduler", "--host", "0.0.0.0"],
        "env": variables,
        "ports": [
            {"name": "tcp-comm", "containerPort": 8786, "protocol": "TCP"},
            {"name": "http-dashboard", "containerPort": 8787, "protocol": "TCP"},
        ],
        "readinessProbe": {**probe, "initialDelaySeconds": 5},
        "livenessProbe": {**probe, "initialDelaySeconds": 15},
    }
    labels = {"dask.org/cluster-name": name, "dask.org/component": "scheduler"}
    service = {
        "type": "ClusterIP",
        "selector": labels,
        "ports": [
            {"name": "tcp-comm", "protocol": "TCP", "port": 8786, "targetPort": "tcp-comm"},
            {"name": "http-dashboard", "protocol": "TCP", "port": 8787, "targetPort": "http-dashboard"},
        ],
    }
    return {
        "apiVersion": "kubernetes.dask.org/v1",
        "kind": "DaskCluster",
        "metadata": {"name": name},
        "spec": {
            "worker": {"replicas": settings.workers or 1, "spec": {**pod, "containers": [worker]}},
            "scheduler": {"spec": {"containers": [scheduler]}, "service": service},
        },
    }


def worker_environment() -> dict[str, str]:
    """DASK_CONFIG as environment variables, for processes that other programs start."""
    return {
        f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
        for key, value in DASK_CONFIG.items()
        if "environ"
        not in key  # names of variables do not survive Dask's spelling; its default for OMP_NUM_THREADS is 1
    }


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself. `gpu` names the GPU that its engine would take; empty without one."""

    version: str
    threads: int
    profiler: bool
    gpu: str


def check_workers(client: Client, slots: int) -> None:
    """Looks at the workers that are there now; later ones are taken as they are.

    Raises:
        ClusterError: names the worker and how to start it right.
    """
    found: dict[str, Any] = client.run(_facts, on_error="return")
    if not found:
        log.warning("no workers at %s yet: the run waits for the first one", client.scheduler.address)
    facts = {
        address: fact for address, fact in found.items() if not isinstance(fact, OSError)
    }  # it has just left
    if problem := find_problem(facts, slots):
        raise ClusterError(*problem)
    if any(fact.profiler for fact in facts.values()):
        name = "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False"
        log.warning("Dask's profiler is on and can hang a worker for ever: start the workers with %s", name)


def find_problem(facts: dict[str, Any], slots: int) -> tuple[str, str, str] | None:
    """The first thing wrong with workers, by address: what, where and the fix. An exception stands for no answer."""
    owners: dict[str, str] = {}
    for address, fact in facts.items():
        if not isinstance(fact, WorkerFacts):
            install = f"install batchrun {batchrun.__version__} beside it"
            return f"the worker cannot load batchrun ({_first_line(fact)})", address, install
        if fact.version != batchrun.__version__:
            what = f"the worker has batchrun {fact.version}, the driver {batchrun.__version__}"
            return what, address, "install the same on both"
        if fact.threads != slots:
            what = f"the worker takes {fact.threads} partitions at once, cluster.slots says {slots}"
            return what, address, f"start it with --nthreads {slots}, or set cluster.slots: {fact.threads}"
        if fact.gpu and fact.gpu in owners:
            what = f"the worker uses the same GPU as {owners[fact.gpu]}"
            return what, address, "start each with a CUDA_VISIBLE_DEVICES of its own"
        owners[fact.gpu] = address
    return None


def _facts(dask_worker: Worker) -> WorkerFacts:
    return WorkerFacts(
        version=batchrun.__version__,
        threads=dask_worker.state.nthreads,
        profiler="profile" in dask_worker.periodic_callbacks,
        gpu=_own_gpu(),
    )


def _own_gpu() -> str:
    """Machine and GPU of this process's engine, without a second for torch on the worker's event loop."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0").partition(",")[0].strip()
    if not Path("/proc/driver/nvidia/gpus").exists() or visible in ("", "-1"):
        return ""
    # Containers on one machine have names of their own, and number their GPUs from 0.
    return f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {socket.gethostname()} {visible}"


def _optional(module: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        what = f"the package {module.partition('.')[0].replace('_', '-')} is not installed"
        raise ClusterError(what, f"cluster.{extra}", f"pip install 'batchrun[{extra}]'") from None


def _first_line(error: BaseException) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]
