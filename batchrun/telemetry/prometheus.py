"""A run's Prometheus metrics, of driver and workers: one scrape target, fed by the heartbeats that the driver reads."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    InfoMetricFamily,
    SummaryMetricFamily,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from batchrun.errors import ClusterError
from batchrun.telemetry.progress import Progress, ProgressCallback, WorkerView
from batchrun.telemetry.rates import Rates

# Of the whole run, sums since its start: the metric, the counter, what it is.
COUNTERS = [
    ("batchrun_rows_generated", "rows", "Rows this run has generated or copied, failed ones included."),
    ("batchrun_rows_copied", "copied", "Those of them with the answer of another row with the same prompt."),
    ("batchrun_rows_reused", "reused", "Rows that earlier attempts had staged."),
    ("batchrun_requests", "requests", "Rows sent to engines."),
    ("batchrun_prompt_tokens", "prompt_tokens", "Prompt tokens of generated rows."),
    ("batchrun_output_tokens", "output_tokens", "Tokens generated."),
]
# Of each worker's engine and GPU, likewise.
ENGINE_COUNTERS = [
    ("batchrun_engine_prompt_tokens", "prompt_tokens", "Prompt tokens computed."),
    ("batchrun_engine_output_tokens", "output_tokens", "Tokens generated."),
    (
        "batchrun_engine_shared_tokens",
        "shared_tokens",
        "Prompt tokens shared with another row's, not computed.",
    ),
    ("batchrun_engine_computed_tokens", "computed_tokens", "Token positions computed, padding included."),
    ("batchrun_engine_batches", "batches", "Batches or rounds computed."),
    ("batchrun_engine_busy_seconds", "busy_seconds", "Time spent in the model."),
]
ENGINE_GAUGES = [
    ("batchrun_engine_active_rows", "active_rows", "Rows that decode at once (paged)."),
    ("batchrun_engine_pages", "pages", "Key/value pages there are (paged)."),
    ("batchrun_engine_free_pages", "pages_free", "Key/value pages free (paged)."),
    ("batchrun_engine_batch_budget_tokens", "batch_tokens", "Padded tokens of a batch at most (padded)."),
]
GPU_GAUGES = [
    (
        "batchrun_gpu_utilization_ratio",
        "use",
        "Share of the time in which a kernel ran, mean of a worker's GPUs.",
    ),
    ("batchrun_gpu_memory_used_bytes", "memory_used", "Memory in use on all of the worker's GPUs."),
    ("batchrun_gpu_memory_total_bytes", "memory_total", "Memory there is on all of the worker's GPUs."),
]
WORKER = ["worker", "host"]
LOOPBACK = "127.0.0.1"


@contextmanager
def serve(address: int | str, info: dict[str, str]) -> Iterator[ProgressCallback]:
    """Serves `/metrics` on the loopback interface while open; yields the callback that feeds it.

    `address` is host:port, or a port alone; `info` says which run it is.

    Raises:
        ClusterError: the address is not available.
    """
    exporter = Exporter(info)
    registry = CollectorRegistry()
    host, _, port = str(address).rpartition(":")
    registry.register(exporter)
    try:
        server, thread = start_http_server(int(port), host or LOOPBACK, registry=registry)
    except OSError as error:
        raise ClusterError(
            f"port {address} is not available ({error.strerror})", "cluster.metrics_port", "choose another"
        ) from None
    try:
        yield exporter.on_progress
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class Exporter(Collector):
    """Turns the newest progress into metrics when somebody asks.

    Counters never fall, as Prometheus takes a fall for a restart: rows of an attempt that was lost with its worker
    are gone from the run's sums, and counted here until other rows have made up for them.
    """

    def __init__(self, info: dict[str, str]) -> None:
        self.info = info
        self.started = time.time()
        self._rates = Rates()
        self._now: Progress | None = None
        self._highest: dict[str, float] = {}
        # Once there was one, also while there is no worker.
        self._has_gpus = False

    def on_progress(self, now: Progress) -> None:
        """Takes in the newest progress."""
        self._rates.add(now)
        self._now = now
        self._has_gpus = self._has_gpus or any(view.gpu for view in now.worker_views)

    def collect(self) -> Iterable[Metric]:
        """The client library's call for each scrape."""
        yield InfoMetricFamily("batchrun_run", "What runs.", self.info)
        yield GaugeMetricFamily("batchrun_start_time_seconds", "When the run began, Unix time.", self.started)
        if self._now is not None:
            yield from self._run(self._now)
            yield from self._workers(self._now.worker_views)

    def _run(self, now: Progress) -> Iterator[Metric]:
        yield GaugeMetricFamily("batchrun_rows_planned", "Rows in the plan.", now.rows)
        yield GaugeMetricFamily("batchrun_rows_covered", "Rows in parts, staged or finished.", now.rows_done)
        for name, field, text in COUNTERS:
            yield CounterMetricFamily(name, text, self._rising(name, getattr(now.counts, field)))
        failed = CounterMetricFamily(
            "batchrun_rows_failed", "Rows without an answer, by error code.", labels=["code"]
        )
        for code in sorted({*now.counts.errors, *self._codes()}):
            failed.add_metric([code], self._rising(f"failed {code}", now.counts.errors.get(code, 0)))
        yield failed
        partitions = GaugeMetricFamily("batchrun_partitions", "Partitions by state.", labels=["state"])
        waiting = now.partitions - now.partitions_done - now.partitions_in_flight
        for state, count in (
            ("committed", now.partitions_done),
            ("submitted", now.partitions_in_flight),
            ("waiting", waiting),
        ):
            partitions.add_metric([state], count)
        yield partitions
        yield SummaryMetricFamily(
            "batchrun_commit_seconds",
            "Time to build and put a part.",
            count_value=now.counts.commits,
            sum_value=now.counts.commit_seconds,
        )
        yield GaugeMetricFamily("batchrun_workers", "Workers there are.", now.workers)
        if self._has_gpus:
            yield GaugeMetricFamily("batchrun_gpus", "GPUs that the workers' engines have.", now.gpus)
            yield CounterMetricFamily(
                "batchrun_gpu_seconds", "Time of the workers' GPUs, whatever they did.", now.gpu_seconds
            )
        remaining = self._rates.remaining()
        if remaining is not None:
            yield GaugeMetricFamily("batchrun_remaining_seconds", "Time that the rest will take.", remaining)

    def _workers(self, worker_views: Sequence[WorkerView]) -> Iterator[Metric]:
        engines = [(worker, worker.engine) for worker in worker_views if worker.engine]
        gpus = [(worker, worker.gpu) for worker in worker_views if worker.gpu]
        tasks = [(worker, worker.tasks) for worker in worker_views]
        memory = [(worker, worker.memory) for worker in worker_views]
        yield _labelled(
            GaugeMetricFamily, "batchrun_worker_tasks", "Partitions at work on the worker.", tasks
        )
        yield _labelled(
            GaugeMetricFamily, "batchrun_worker_memory_bytes", "Memory of the worker's own process.", memory
        )
        waiting = [(worker, engine.requests - engine.completions) for worker, engine in engines]
        yield _labelled(
            GaugeMetricFamily,
            "batchrun_engine_waiting_requests",
            "Requests that the engine holds and has not answered.",
            waiting,
        )
        for name, field, text in ENGINE_COUNTERS:
            counts = [(worker, getattr(engine, field)) for worker, engine in engines]
            yield _labelled(CounterMetricFamily, name, text, counts)
        for name, field, text in ENGINE_GAUGES:
            gauges = [(worker, engine.gauges.get(field)) for worker, engine in engines]
            yield _labelled(GaugeMetricFamily, name, text, gauges)
        for name, field, text in GPU_GAUGES:
            yield _labelled(
                GaugeMetricFamily, name, text, [(worker, getattr(gpu, field)) for worker, gpu in gpus]
            )

    def _rising(self, name: str, value: float) -> float:
        self._highest[name] = max(value, self._highest.get(name, 0))
        return self._highest[name]

    def _codes(self) -> list[str]:
        return [name.removeprefix("failed ") for name in self._highest if name.startswith("failed ")]


def _labelled(
    family: type[GaugeMetricFamily] | type[CounterMetricFamily],
    name: str,
    text: str,
    values: Iterable[tuple[WorkerView, float | None]],
) -> Metric:
    metric = family(name, text, labels=WORKER)
    for worker, value in values:
        if value is not None:
            metric.add_metric([worker.address, worker.host], value)
    return metric
