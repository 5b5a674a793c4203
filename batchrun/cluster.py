"""A Dask client for the job: a local cluster with one worker per GPU (or one on a CPU), or a scheduler's address."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dask
from distributed import Client, Nanny, Scheduler, Security, SpecCluster

from batchrun.errors import ClusterError
from batchrun.job import ClusterSettings, TlsSettings

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
                client = Client(
                    settings.address, timeout="15s", set_as_default=False, security=_security(settings.tls)
                )
            except (OSError, TimeoutError, ValueError) as error:
                raise ClusterError(
                    f"no Dask scheduler answers ({type(error).__name__})",
                    settings.address,
                    "start one with `dask scheduler`, or leave cluster.address out for a local cluster",
                ) from None
            with client:
                yield client
            return
        # Everybody with an account on this machine reaches its loopback, and a scheduler runs what it is sent.
        private = Security.temporary()
        with (
            SpecCluster(
                security=private,
                workers=_local_workers(settings, private),
                scheduler={
                    "cls": Scheduler,
                    "options": {
                        "dashboard": False,
                        "dashboard_address": "127.0.0.1:0",
                        "host": "127.0.0.1",
                        "port": 0,
                        "protocol": "tls",
                        "security": private,
                    },
                },
                silence_logs=logging.CRITICAL,
            ) as cluster,
            Client(cluster, set_as_default=False) as client,
        ):
            yield client


def _security(tls: TlsSettings | None) -> Security | None:
    """What a client shows and asks for at a `tls://` address.

    Raises:
        ClusterError: a file is missing, or holds no certificate or key.
    """
    if tls is None:
        return None
    security = Security(
        require_encryption=True, tls_ca_file=tls.ca, tls_client_cert=tls.cert, tls_client_key=tls.key
    )
    try:
        security.get_connection_args("client")
    except OSError as error:  # ssl.SSLError is one
        raise ClusterError(
            f"its certificates cannot be loaded ({error})", "cluster.tls", "give PEM files for ca, cert, key"
        ) from None
    return security


def _local_workers(settings: ClusterSettings, private: Security) -> dict[int, dict[str, Any]]:
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
            "protocol": "tls",
            "security": private,
            "dashboard": False,
            "dashboard_address": "127.0.0.1:0",
            "silence_logs": logging.CRITICAL,
            "env": env,
        }
        workers[i] = {"cls": Nanny, "options": options}
    return workers


def visible_gpus() -> list[str]:
    """The GPUs this process may use, as values for CUDA_VISIBLE_DEVICES; empty on a machine without one."""
    import torch  # heavy, and only a local cluster needs to know

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()  # asks the driver library: takes no memory on any GPU
    return [name.strip() for name in named.split(",")][:count] if named else [str(i) for i in range(count)]
