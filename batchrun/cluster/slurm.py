"""Workers as Slurm jobs, through dask-jobqueue."""

from __future__ import annotations

import asyncio
import logging
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from distributed import Status
from tornado.ioloop import PeriodicCallback

from batchrun.cluster.config import optional, refuse_too_few, worker_environment
from batchrun.errors import ClusterError, first_line
from batchrun.job.settings import ClusterSettings

# Seconds between two looks at whether a Slurm job has to be submitted again, after a preemption or its time limit.
RESUBMIT = 30.0
# The ways to ask Slurm for GPUs of one job, with a type or without, and how many of them.
_GPUS = re.compile(
    r"\s*(?:--gres[= ](?:\S*,)?gpu|--gpus(?:-per-(?:node|task))?[= ]|-G)(?:[^,]*?[:\s])??(\d+)?(?:,|$)"
)


@contextmanager
def slurm_cluster(settings: ClusterSettings, gpus: int = 1) -> Iterator[Any]:
    """As many one-worker Slurm jobs as the job asks for, each with so many `gpus`; those that end before the run are
    submitted again.

    Raises:
        ClusterError: dask-jobqueue is not installed, its options do not fit, or sbatch refuses the jobs.
    """
    module = slurm_module()
    jobs = settings.workers or 1
    try:
        cluster = module.SLURMCluster(**slurm_options(settings, gpus), silence_logs=logging.CRITICAL)
    except (TypeError, ValueError) as error:
        raise ClusterError(first_line(error), "cluster.slurm", "options are those of SLURMCluster") from None
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
                # A job left as created makes closing the cluster fail.
                job.status = Status.failed
            reason = " ".join(str(error).partition("stderr:")[2].split()) or first_line(error)
            raise ClusterError(
                f"sbatch refused ({reason})", "cluster.slurm", "try the options with sbatch"
            ) from None
        again = PeriodicCallback(lambda: cluster.scale(jobs), RESUBMIT * 1000)
        cluster.loop.add_callback(again.start)
        try:
            yield cluster
        finally:
            cluster.loop.add_callback(again.stop)


def slurm_module() -> Any:
    """dask-jobqueue. Raises ClusterError where it or Slurm's own command is missing on this machine."""
    if shutil.which("sbatch") is None:
        raise ClusterError(
            "no sbatch command here", "cluster.slurm", "start the run on a machine that submits jobs"
        )
    return optional("dask_jobqueue", "slurm")


def slurm_options(settings: ClusterSettings, gpus: int = 1) -> dict[str, Any]:
    """Options of dask-jobqueue's SLURMCluster: the job's own, and those that batchrun needs.

    One worker process per Slurm job, with as many threads as it has slots; `job_cpu` books more cores. An engine of
    several `gpus` gets them by `--gres` where no directive of the job's own asks for GPUs.

    Raises:
        ClusterError: the job's own directives ask for fewer.
    """
    options = dict(settings.slurm or {})
    directives = list(options.get("job_extra_directives", []))
    asked = [int(found[1] or 1) for line in directives if (found := _GPUS.match(str(line)))]
    if asked:
        refuse_too_few(max(asked), gpus, "cluster.slurm", "job_extra_directives")
    elif gpus > 1:
        directives.append(f"--gres=gpu:{gpus}")
    exports = [f"export {name}={value}" for name, value in worker_environment().items()]
    return {
        "memory": "16GiB",
        **options,
        **({"job_extra_directives": directives} if directives else {}),
        "cores": settings.slots,
        "processes": 1,
        "job_script_prologue": [*options.get("job_script_prologue", []), *exports],
        "worker_extra_args": [*options.get("worker_extra_args", []), "--no-dashboard"],
        "scheduler_options": {"dashboard_address": ":0", **options.get("scheduler_options", {})},
    }
