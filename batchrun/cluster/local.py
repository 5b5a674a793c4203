"""Workers on this machine, reachable from nowhere else."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from distributed import Scheduler, Security, SpecCluster, Status
from tornado.ioloop import PeriodicCallback

from batchrun.cluster.nanny import WorkerNanny
from batchrun.engine.processes.standby import VARIABLE
from batchrun.errors import ClusterError
from batchrun.job.settings import ClusterSettings
from batchrun.model import light
from batchrun.telemetry.gpu import environment_of_gpus, local_workers, visible_gpus
from batchrun.telemetry.printable import counted

log = logging.getLogger(__name__)

# Seconds between two looks at whether a worker is missing. A nanny gives up when its worker dies while it starts, and
# Dask takes one away whose worker was gone for 15 seconds.
RESTORE_EVERY = 2.0


@contextmanager
def local_cluster(
    settings: ClusterSettings, standby: Sequence[str] = (), gpus: int = 1
) -> Iterator[SpecCluster]:
    """A scheduler and the job's workers, as processes of this machine; workers that are lost come again. `standby`
    names the engines' processes that stand by for the workers, of which each has so many `gpus`.

    Raises:
        ClusterError: as `environments`.
    """
    # Everybody with an account on this machine reaches its loopback, and a scheduler runs what it is sent.
    private = Security.temporary()
    workers = _workers(settings, private, standby, gpus)
    with SpecCluster(
        security=private,
        workers=workers,
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
    ) as cluster:

        def restore() -> None:
            for name, nanny in list(cluster.workers.items()):
                if nanny.status in (Status.closed, Status.failed):
                    del cluster.workers[name]
            if len(cluster.workers) < len(workers):
                cluster.scale(len(workers))

        again = PeriodicCallback(restore, RESTORE_EVERY * 1000)
        cluster.loop.add_callback(again.start)
        try:
            yield cluster
        finally:
            cluster.loop.add_callback(again.stop)
            cluster.sync(_kill, list(cluster.workers.values()))


async def _kill(nannies: Sequence[WorkerNanny]) -> None:
    """Ends the workers at once: tasks have staged what they had to, and nothing in a worker is durable. Closing them
    takes seconds, in which GPUs are paid for. An engine dies with its worker."""
    for nanny in nannies:
        # So that it starts no other.
        nanny.close_gracefully()
        if nanny.pid:
            os.kill(nanny.pid, signal.SIGKILL)


def environments(settings: ClusterSettings, each: int) -> list[dict[str, str]]:
    """What each of this machine's workers adds to its processes' environment: `each` so many GPUs of its own, if there
    are any.

    Raises:
        ClusterError: more are asked for than there are.
    """
    gpus = visible_gpus()
    count = local_workers(settings.workers, gpus, each)
    if gpus and each > len(gpus):
        what = f"{each} GPUs for one engine asked for, {counted(len(gpus), 'GPU')} visible"
        raise ClusterError(what, "engine.gpus", "ask for fewer, or use a larger machine")
    if gpus and count * each > len(gpus):
        what = f"{counted(count, 'worker')} asked for, {counted(len(gpus), 'GPU')} visible"
        fix = "a GPU takes one worker" if each == 1 else f"a worker takes {each} (engine.gpus)"
        raise ClusterError(what, "cluster.workers", fix)
    return [environment_of_gpus(gpus, i, each) for i in range(count)]


def unused_gpus(settings: ClusterSettings, each: int) -> int:
    """GPUs of this machine that are too few for one more engine; 0 where the job says how many workers it wants."""
    return 0 if settings.workers else len(visible_gpus()) % each


def _workers(
    settings: ClusterSettings, private: Security, standby: Sequence[str], gpus: int
) -> dict[int, dict[str, Any]]:
    if unused := unused_gpus(settings, gpus):
        log.warning("%s of this machine unused: engine.gpus is %d", counted(unused, "GPU"), gpus)
    workers = {}
    for i, own in enumerate(environments(settings, gpus)):
        env = {light.VARIABLE: "1"} | own
        if i < len(standby):
            env[VARIABLE] = standby[i]
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
        workers[i] = {"cls": WorkerNanny, "options": options}
    return workers
