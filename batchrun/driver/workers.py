"""The workers of one run: a local cluster starts, and loads its engines, while the job is still being checked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from types import TracebackType
from typing import Any, Self

from distributed import Client

from batchrun.cluster import connect, refuse_unusable
from batchrun.driver.prepare import Prepared
from batchrun.engine.processes.standby import Standby
from batchrun.engine.protocol import EngineSpec
from batchrun.storage import deadline
from batchrun.telemetry.milestones import Milestones
from batchrun.worker.plugin import BatchrunPlugin, start_engine

# Tries to reach all workers, of which one may be dying.
REGISTRATIONS = 3
# Seconds for all workers to hear of something.
TELLING = 0.5
# For the scheduler to say which workers there are.
LOOKING = 3.0


class Workers:
    """A context. `client` is the given one, or one of the job's own cluster, which ends with the context at the latest.

    Only a local cluster is begun ahead: it takes nothing from anybody, and ends with a job that is refused after
    all. Elsewhere workers, and the GPUs they hold, are asked for once the job is known to be good. The engines'
    processes in `standby` are the local workers' own.
    """

    def __init__(
        self,
        prepared: Prepared,
        client: Client | None,
        milestones: Milestones,
        standby: Sequence[Standby] = (),
    ) -> None:
        self._prepared, self._given, self._milestones = prepared, client, milestones
        self._standby = standby
        self._ahead = client is None and prepared.job.cluster.is_local
        self._starting: Future[Client] | None = None
        self._stack = ExitStack()
        self._pool = ThreadPoolExecutor(1, "batchrun-cluster")

    def __enter__(self) -> Self:
        """Raises ClusterError as `refuse_unusable` does."""
        if self._given is None:
            refuse_unusable(self._prepared.job.cluster, self._prepared.gpus)
        return self

    def begin(self) -> None:
        """Starts the cluster in a thread of its own, opens the prompt meanwhile, and has the engines load.

        Raises:
            Refused: as `Prepared.codec` does.
        """
        if self._ahead:
            for engine in self._standby:
                engine.prepare(self._prepared.model.path)
            self._starting = self._pool.submit(self._connect)
            self._pool.submit(_start_engines, self._starting, self._prepared.codec.engine)

    @property
    def client(self) -> Client:
        """Waits for the cluster. Raises ClusterError as `connect` does."""
        return self._starting.result() if self._starting else self._connect()

    def end(self) -> None:
        """Ends the cluster in a thread of its own; leaving the context waits for it."""
        self._pool.submit(self._stack.close)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # A cluster that is still starting cannot be stopped halfway.
        self._pool.shutdown(cancel_futures=True)
        self._stack.close()

    def _connect(self) -> Client:
        names = [engine.name for engine in self._standby]
        prepared = self._prepared
        client = self._given or self._stack.enter_context(connect(prepared.job.cluster, names, prepared.gpus))
        self._milestones.reach("cluster ready")
        return client


def register_plugin(client: Client) -> None:
    """Hooks the plugin into all workers, now and later. One that dies in the midst of it fails the whole call."""
    for more in reversed(range(REGISTRATIONS)):
        try:
            client.register_plugin(BatchrunPlugin())
            return
        except OSError:
            if client.status != "running" or not more:
                raise


def look_at(client: Client, before: dict[str, Any]) -> dict[str, Any]:
    """The workers there are and what they last said, by address; as `before` where nobody answers, which the client's
    status tells.

    Not by `Client.scheduler_info`: that gives back what the client heard last, and it asks now and then for itself, for
    no worker at all. A run would take that for workers that are gone.
    """
    if client.scheduler is None:
        return before
    try:
        workers: dict[str, Any] = client.sync(
            client.scheduler.identity, n_workers=-1, callback_timeout=LOOKING
        )["workers"]
    except OSError:
        return before
    return workers


def tell(client: Client, call: Callable[..., Any], *words: Any, workers: Sequence[str] | None = None) -> None:
    """Has the workers, all of them by default, run a coroutine, and waits for TELLING at most: Dask's own call comes
    back when the last of them has heard of it, and one may be dying, or only starting."""
    with suppress(TimeoutError):
        deadline.within(
            TELLING, lambda: client.run(call, *words, workers=workers, wait=False, on_error="ignore")
        )


def _start_engines(starting: Future[Client], engine: EngineSpec) -> None:
    starting.result().run(start_engine, engine, wait=False, on_error="ignore")
