"""Whether workers that others started can do the job."""

from __future__ import annotations

import logging
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distributed import Client, Worker

from batchrun.errors import ClusterError, first_line
from batchrun.telemetry.gpu import named_gpus
from batchrun.telemetry.printable import counted
from batchrun.version import __version__

log = logging.getLogger(__name__)

SAME_WHEEL = (
    f"install the same wheel of batchrun {__version__} on every machine "
    "(`pip wheel . --no-deps` in its checkout makes one)"
)


@dataclass(frozen=True)
class WorkerFacts:
    """What a worker says of itself. `gpus` name those that it may use, in its engine's order; none on a CPU."""

    version: str
    threads: int
    profiler: bool
    gpus: tuple[str, ...]


def check_workers(client: Client, slots: int, gpus: int = 1) -> None:
    """Looks at the workers that are there now, which are to take so many partitions and have so many GPUs for their
    engine; later ones are taken as they are.

    Raises:
        ClusterError: names the worker and how to start it right.
    """
    found: dict[str, Any] = client.run(_facts, on_error="return")
    if not found:
        log.warning("no workers at %s yet: the run waits for the first one", client.scheduler.address)
    # One that cannot be asked has just left.
    facts = {address: fact for address, fact in found.items() if not isinstance(fact, OSError)}
    if problem := find_problem(facts, slots, gpus):
        raise ClusterError(*problem)
    if any(fact.profiler for fact in facts.values()):
        name = "DASK_DISTRIBUTED__WORKER__PROFILE__ENABLED=False"
        log.warning("Dask's profiler is on and can hang a worker for ever: start the workers with %s", name)


def find_problem(facts: dict[str, Any], slots: int, gpus: int = 1) -> tuple[str, str, str] | None:
    """The first thing wrong with workers, by address: what, where and the fix. An exception stands for no answer."""
    owners: dict[str, str] = {}
    for address, fact in facts.items():
        if not isinstance(fact, WorkerFacts):
            return f"the worker cannot load batchrun ({first_line(fact)})", address, SAME_WHEEL
        if fact.version != __version__:
            what = f"the worker has batchrun {fact.version}, the driver {__version__}"
            return what, address, SAME_WHEEL
        if fact.threads != slots:
            what = f"the worker takes {fact.threads} partitions at once, cluster.slots says {slots}"
            return what, address, f"start it with --nthreads {slots}, or set cluster.slots: {fact.threads}"
        if 0 < len(fact.gpus) < gpus:
            what = f"the worker may use {counted(len(fact.gpus), 'GPU')}, engine.gpus says {gpus}"
            names = ",".join(map(str, range(gpus)))
            return what, address, f"start it with {gpus} GPUs of its own, as in CUDA_VISIBLE_DEVICES={names}"
        # An engine takes the first ones of those that it is shown.
        own = fact.gpus[:gpus]
        if taken := [owners[gpu] for gpu in own if gpu in owners]:
            what = f"the worker uses the same GPU as {taken[0]}"
            return what, address, "start each with a CUDA_VISIBLE_DEVICES of its own"
        owners |= dict.fromkeys(own, address)
    return None


def _facts(dask_worker: Worker) -> WorkerFacts:
    return WorkerFacts(
        version=__version__,
        threads=dask_worker.state.nthreads,
        profiler="profile" in dask_worker.periodic_callbacks,
        gpus=_own_gpus(),
    )


def _own_gpus() -> tuple[str, ...]:
    """Machine and GPUs of this process's engine, without a second for torch on the worker's event loop."""
    if not Path("/proc/driver/nvidia/gpus").exists():
        return ()
    # Containers on one machine have names of their own, and number their GPUs from 0.
    machine = f"{Path('/proc/sys/kernel/random/boot_id').read_text().strip()} {socket.gethostname()}"
    return tuple(f"{machine} {name}" for name in named_gpus())
