"""How far a run is: what the driver knows of it each second."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from batchrun.counters import Counters
from batchrun.engine.protocol import EngineStats
from batchrun.telemetry.gpu import Gpu
from batchrun.telemetry.record import SlowPartition


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One worker by its last heartbeat: tasks in hand, memory (bytes) of its process, its engine and its GPUs.

    `doing` is "starting", "loading", "compiling", "generating", "sealing" or "idle". `rows` are those of the partitions
    that it has in hand, `counts` what was counted of them.
    """

    address: str
    host: str
    tasks: int
    slots: int
    memory: int
    doing: str
    engine: EngineStats | None = None
    gpu: Gpu | None = None
    rows: int = 0
    counts: Counters = field(default_factory=Counters)


@dataclass(frozen=True, slots=True)
class Progress:
    """A run at one moment. `rows_done` counts what is covered, of earlier runs too; the rest is this run's alone.

    `engines` holds the counters of every engine process that the run has used, `worker_views` the workers there are
    now, and `worker_time` adds up their seconds, by what they did. Each has `gpus_per_worker` for its engine.
    """

    seconds: float
    partitions: int
    partitions_done: int
    partitions_in_flight: int
    rows: int
    rows_done: int
    counts: Counters
    workers: int
    gpus_per_worker: int = 1
    worker_time: Mapping[str, float] = field(default_factory=dict)
    worker_views: Sequence[WorkerView] = ()
    engines: Sequence[EngineStats] = ()
    slowest: Sequence[SlowPartition] = ()
    dashboard: str | None = None

    @property
    def worker_seconds(self) -> float:
        """For how long there were how many workers, added up."""
        return sum(self.worker_time.values())

    @property
    def gpu_seconds(self) -> float:
        """The same of the workers' GPUs."""
        return self.gpus_per_worker * self.worker_seconds

    @property
    def gpus(self) -> int:
        """Those of all workers that there are now."""
        return self.gpus_per_worker * self.workers

    @property
    def computed_tokens(self) -> int:
        """Token positions that models were run on, padding included."""
        return sum(engine.computed_tokens for engine in self.engines)

    @property
    def real_tokens(self) -> int:
        """Those among them that are a prompt's or an answer's."""
        return sum(engine.prompt_tokens + engine.output_tokens for engine in self.engines)

    @property
    def shared_tokens(self) -> int:
        """Prompt tokens that no model was run on, since another row's prompt begins alike."""
        return sum(engine.shared_tokens for engine in self.engines)

    @property
    def padding_efficiency(self) -> float | None:
        """Real tokens / computed tokens, None before anything was computed."""
        return self.real_tokens / self.computed_tokens if self.computed_tokens else None

    @property
    def batches(self) -> int:
        """Batches of all engines together."""
        return sum(engine.batches for engine in self.engines)

    @property
    def waiting(self) -> int:
        """Requests that engines hold and have not answered."""
        return sum(
            view.engine.requests - view.engine.completions for view in self.worker_views if view.engine
        )

    @property
    def pool_fill(self) -> float | None:
        """Share of the key/value pages in use over all paged engines, None where there is none."""
        gauges = [
            view.engine.gauges for view in self.worker_views if view.engine and "pages" in view.engine.gauges
        ]
        pages = sum(gauge["pages"] for gauge in gauges)
        return 1 - sum(gauge["pages_free"] for gauge in gauges) / pages if pages else None

    @property
    def gpu_use(self) -> float | None:
        """Mean over the workers' GPUs of the share of time in which a kernel ran, None without a GPU."""
        seen = [view.gpu for view in self.worker_views if view.gpu and view.gpu.use is not None]
        count = sum(gpu.count for gpu in seen)
        return sum((gpu.use or 0.0) * gpu.count for gpu in seen) / count if count else None

    @property
    def gpu_memory(self) -> float | None:
        """Share of the GPUs' memory in use, None without a GPU."""
        gpus = [view.gpu for view in self.worker_views if view.gpu]
        return sum(gpu.memory_used for gpu in gpus) / sum(gpu.memory_total for gpu in gpus) if gpus else None


ProgressCallback = Callable[[Progress], None]


def silent(_: Progress) -> None:
    """Shows nothing."""


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 12 min 05 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
