"""A Dask client for the job: local workers, one per GPU (or group of GPUs) or one on a CPU, or workers
elsewhere.

Elsewhere is a running scheduler's address, jobs on Slurm (dask-jobqueue) or pods on Kubernetes (dask-kubernetes).
Used by the driver, and by `plan`, which asks how many GPUs there are. May import Dask and job; knows no worker's task.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from urllib.request import urlopen

import dask
from distributed import Client, Security

from batchrun import signals
from batchrun.cluster.check import check_workers
from batchrun.cluster.config import DASK_CONFIG
from batchrun.cluster.kubernetes import kubernetes_cluster, kubernetes_module, kubernetes_spec
from batchrun.cluster.local import environments, local_cluster
from batchrun.cluster.nanny import apart
from batchrun.cluster.slurm import slurm_cluster, slurm_module, slurm_options
from batchrun.errors import ClusterError
from batchrun.job.settings import ClusterSettings, TlsSettings

# In the names of Dask's own folders.
SCRATCH = "dask-scratch-space"


def refuse_unusable(settings: ClusterSettings, gpus: int = 1) -> None:
    """Looks at what can be told without asking anybody, so that nothing was written when it is refused.

    Raises:
        ClusterError: certificates, options, a command or a package that `connect` needs are missing or wrong; workers
            would get fewer than so many `gpus`.
    """
    _security(settings.tls)
    if settings.is_local:
        environments(settings, gpus)
    if settings.slurm is not None:
        slurm_options(settings, gpus)
        slurm_module()
    if settings.kubernetes is not None:
        kubernetes_spec(settings, gpus)
        kubernetes_module()


@contextmanager
def connect(settings: ClusterSettings, standby: Sequence[str] = (), gpus: int = 1) -> Iterator[Client]:
    """Yields a client of the cluster that the job asks for, whose workers have so many `gpus` each; a local cluster
    ends with the context. Of its workers each takes the engine's process that stands by for it under the name in its
    place.

    Raises:
        ClusterError: no scheduler answers at the address.
    """
    # That a worker left, came or closed a connection is the driver's news to tell, in the run's own words.
    for name in ("distributed", "distributed.client"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    # What a stop cuts off in the midst of a task of theirs is no news either.
    for name in ("asyncio", "tornado.application"):
        logging.getLogger(name).addFilter(_unless_stopped)
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
                check_workers(client, settings.slots, gpus)
                yield client
            return
        before = {*sys.path}
        with apart(), _start(settings, standby, gpus) as cluster:
            # Dask put its scratch folder first, and takes it out of this list when the cluster ends: a thread that
            # goes through the list then, for an import, would miss the folder of what it imports.
            sys.path = [folder for folder in sys.path if folder in before or SCRATCH not in folder]
            with Client(cluster, set_as_default=False) as client:
                yield client


def _unless_stopped(record: logging.LogRecord) -> bool:
    return not signals.stop.is_set()


def _start(settings: ClusterSettings, standby: Sequence[str], gpus: int) -> AbstractContextManager[Any]:
    if settings.slurm is not None:
        return slurm_cluster(settings, gpus)
    if settings.kubernetes is not None:
        return kubernetes_cluster(settings, gpus)
    return local_cluster(settings, standby, gpus)


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
    except OSError as error:
        # ssl.SSLError is one.
        raise ClusterError(
            f"its certificates cannot be loaded ({error.strerror})",
            "cluster.tls",
            "give PEM files for ca, cert, key",
        ) from None
    return security


def dashboard(client: Client) -> str | None:
    """The address of Dask's own dashboard, where the scheduler serves one that can be reached from here."""
    if "dashboard" not in client.scheduler_info(n_workers=0)["services"]:
        return None
    link: str = client.dashboard_link
    try:
        urlopen(link, timeout=2).close()
    except OSError:
        # The port is named even where no dashboard was asked for.
        return None
    return link
