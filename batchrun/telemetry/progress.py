"""How far a run is: what the driver knows each second, what follows from it, and one line of it for a person."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from batchrun.counters import Counters
from batchrun.engine.protocol import EngineStats
from batchrun.telemetry.gpu import Gpu
from batchrun.telemetry.record import SlowPartition
from batchrun.telemetry.remaining import Remaining

RATE_WINDOW = 30.0  # seconds over which the shown rates are taken
LOG_EVERY = 15.0  # seconds between two lines where there is no terminal


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


class Rates:
    """Rates over the last half minute, and the seconds that the rest will take."""

    def __init__(self) -> None:
        self._recent: deque[Progress] = deque()
        self._remaining = Remaining()

    def add(self, now: Progress) -> None:
        """Takes in the newest progress."""
        if not now.counts.tokens:
            self._recent.clear()  # loading an engine says nothing of its speed
        self._recent.append(now)
        while len(self._recent) > 2 and now.seconds - self._recent[1].seconds > RATE_WINDOW:
            self._recent.popleft()
        self._remaining.add(now)

    def per_second(self, name: str) -> float:
        """How fast the counter `name` of a run grows."""
        first, last = self._recent[0], self._recent[-1]
        elapsed = last.seconds - first.seconds
        return (
            max(0.0, getattr(last.counts, name) - getattr(first.counts, name)) / elapsed
            if elapsed > 0
            else 0.0
        )

    def of_worker(self, address: str) -> float:
        """Tokens per second, in and out, of one worker's engine; 0 while it is new."""
        seen = [
            (progress.seconds, view.engine.prompt_tokens + view.engine.output_tokens)
            for progress in (self._recent[0], self._recent[len(self._recent) // 2], self._recent[-1])
            for view in progress.worker_views
            if view.address == address and view.engine
        ]
        if len(seen) < 2 or seen[-1][0] <= seen[0][0]:
            return 0.0
        (began, before), (now, tokens) = seen[0], seen[-1]
        return max(0.0, tokens - before) / (now - began)

    def remaining(self) -> float | None:
        """Seconds left, None before the first row is through; see `Remaining`."""
        return self._remaining.seconds()

    def cost(self, price_per_gpu_hour: float) -> tuple[float, float | None]:
        """Money so far, and what the run will have cost in all, None as long as nobody knows."""
        now, remaining = self._recent[-1], self.remaining()
        spent = price_per_gpu_hour * now.gpu_seconds / 3600
        if remaining is None:
            return spent, None
        return spent, spent + price_per_gpu_hour * now.gpus * remaining / 3600


def log_lines(show: Callable[[Progress, Rates], None]) -> ProgressCallback:
    """A callback for where there is no terminal: calls `show` at the start and then every quarter of a minute."""
    rates = Rates()
    last = -LOG_EVERY

    def on_progress(now: Progress) -> None:
        nonlocal last
        rates.add(now)
        if time.monotonic() - last >= LOG_EVERY:
            last = time.monotonic()
            show(now, rates)

    return on_progress


def line(now: Progress, rates: Rates) -> str:
    """The progress as one line, where no live view is shown."""
    share = now.rows_done / now.rows if now.rows else 1.0
    parts = [
        f"{share:4.0%}",
        f"{now.rows_done:,}/{now.rows:,} rows",
        f"{now.partitions_done}/{now.partitions} parts",
        f"{rates.per_second('rows'):,.0f} rows/s",
        f"{rates.per_second('prompt_tokens'):,.0f} tokens/s in",
        f"{rates.per_second('output_tokens'):,.0f} out",
    ]
    if now.counts.failed:
        parts.append(f"{now.counts.failed:,} failed")
    if (remaining := rates.remaining()) is not None:
        parts.append(f"{duration(remaining)} left")
    if not now.workers:
        parts.append("waiting for a worker")
    return " · ".join(parts)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 48 s, 12 min 05 s, 3 h 20 min."""
    whole = round(seconds)
    if whole < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{whole} s"
    if whole < 6000:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"
