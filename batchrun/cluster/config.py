"""How Dask is set up for batchrun, in this process and in those that other programs start."""

from __future__ import annotations

import importlib
import logging
from typing import Any

from batchrun.errors import ClusterError

log = logging.getLogger(__name__)

# Set on purpose, each for a reason that cost somebody a night:
DASK_CONFIG = {
    # A daemonic process may start the engine, a plain subprocess, but nothing through multiprocessing: a tokenizer or
    # filesystem that a user brings along may want to.
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


def worker_environment() -> dict[str, str]:
    """DASK_CONFIG as environment variables, for processes that other programs start."""
    return {
        f"DASK_{key.upper().replace('.', '__').replace('-', '_')}": str(value)
        for key, value in DASK_CONFIG.items()
        # Names of variables do not survive Dask's spelling; its default for OMP_NUM_THREADS is 1.
        if "environ" not in key
    }


def optional(module: str, section: str) -> Any:
    """The module that the job's `cluster.<section>` needs.

    Raises:
        ClusterError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0].replace("_", "-")
        what = f"the package {package} is not installed"
        raise ClusterError(what, f"cluster.{section}", f"pip install {package}") from None


def refuse_too_few(asked: int, gpus: int, where: str, key: str) -> None:
    """Holds the GPUs that a job asks for its workers by itself against those that an engine takes, and warns of more.

    Raises:
        ClusterError: they are too few.
    """
    if asked < gpus:
        what = f"{key} asks for {asked} of the {gpus} GPUs that engine.gpus gives a worker"
        raise ClusterError(what, where, f"ask for {gpus}, or leave it out")
    if asked > gpus:
        log.warning(
            "%s: %d of the %d GPUs of each worker unused: engine.gpus is %d", where, asked - gpus, asked, gpus
        )
