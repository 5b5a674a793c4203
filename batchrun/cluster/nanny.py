"""A nanny whose worker starts apart from the user's script and terminal, and again where it dies on the way."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator, Sized
from contextlib import contextmanager
from multiprocessing import resource_tracker, spawn
from typing import Any

from distributed import Nanny, Status

from batchrun.errors import ClusterError

STARTS = 10
# The name that Dask gives to the process of a worker.
WORKER_PROCESS = "Dask Worker process (from Nanny)"


class WorkerNanny(Nanny):  # type: ignore[misc]
    """Dask's own gives up a worker that is killed before it runs, and with it the cluster that is just starting."""

    async def instantiate(self) -> Status:
        """Starts the worker, again where its process ends before it is up.

        Raises:
            ClusterError: it has ended `STARTS` times.
        """
        for _ in range(STARTS):
            status: Status = await super().instantiate()
            if status == Status.running or self.status in (Status.closing, Status.closed):
                return status
        raise ClusterError(
            f"a worker's process ended {STARTS} times while it was starting",
            "cluster",
            "see what kills it: memory limits of the machine or the container, as a rule",
        )


@contextmanager
def apart() -> Iterator[None]:
    """Inside, Dask's workers start without the script that runs here and out of its terminal's reach.

    A script need not guard its run by `if __name__ == "__main__"`, and what Ctrl-C and a closed terminal mean is the
    driver's to say.
    """
    prepare = spawn.get_preparation_data

    def prepare_worker(name: str) -> dict[str, Any]:
        prepared = prepare(name)
        if name == WORKER_PROCESS:
            prepared.pop("init_main_from_name", None)
            prepared.pop("init_main_from_path", None)
            # Dask has a thread of its own start each worker; a process inherits what its starting thread blocks.
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
        return prepared

    spawn.get_preparation_data = prepare_worker
    _start_quiet_tracker()
    # To stay, since Dask's queues are unregistered when the cluster has ended.
    resource_tracker.unregister = _introduce_and_unregister
    try:
        yield
    finally:
        spawn.get_preparation_data = prepare


def _start_quiet_tracker() -> None:
    """Python's tracker of semaphores outlives a driver that is killed, removes what that had, and would then warn of it
    on a terminal where the shell's prompt is already. It takes its filters of warnings from whoever starts it."""
    sys.warnoptions.append("ignore:resource_tracker")
    try:
        resource_tracker.ensure_running()
    finally:
        sys.warnoptions.remove("ignore:resource_tracker")


def _introduce_and_unregister(name: Sized, rtype: str) -> None:
    """Python's tracker of semaphores comes again where it is killed, and then knows no name from before: for each one
    that is unregistered it would print a traceback, after all that the command has to say."""
    tracker = resource_tracker._resource_tracker
    tracker.register(name, rtype)
    tracker.unregister(name, rtype)
