"""What a run shows of itself while it goes on: metrics for Prometheus, a view for a person, lines for a log."""

from __future__ import annotations

import json
import logging
import re
import socket
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

import batchrun as library
from batchrun.counters import Counters
from batchrun.driver.prepare import prepare
from batchrun.engine.protocol import EngineStats
from batchrun.errors import ClusterError, StorageError
from batchrun.telemetry import gpu, logs
from batchrun.telemetry.gpu import Gpu
from batchrun.telemetry.progress import Progress, WorkerView
from batchrun.telemetry.prometheus import Exporter, serve
from batchrun.telemetry.rates import Rates
from batchrun.telemetry.redact import Redactor
from jobs import ROWS_OF_JOB as ROWS
from jobs import load, write_job

DASHBOARD = Path(__file__).parents[2] / "docker/grafana/batchrun.json"
CARD = Gpu("H200", 0.75, 60 << 30, 140 << 30)


def worker_views(tokens: int, card: Gpu | None = CARD) -> list[WorkerView]:
    stats = EngineStats(
        engine="paged", pid=1, requests=30, completions=20, prompt_tokens=tokens, output_tokens=tokens,
        computed_tokens=3 * tokens, batches=2, busy_seconds=1.5, load_seconds=9.0,
        gauges={"pages": 100, "pages_free": 25, "active_rows": 8, "batch_tokens": 4096},
    )  # fmt: skip
    return [
        WorkerView(f"tcp://10.0.0.{i}:9000", f"10.0.0.{i}", 2, 2, 1 << 30, "generating", stats, card)
        for i in (1, 2)
    ]


def at(seconds: float, rows: int, **more) -> Progress:
    workers = worker_views(rows * 10)
    values = {
        "seconds": seconds, "partitions": 10, "partitions_done": 2, "partitions_in_flight": 3, "rows": 1000,
        "rows_done": rows, "workers": 2, "worker_time": {"generating": seconds * 2}, "worker_views": workers,
        "counts": Counters(
            rows=rows, failed=3, requests=rows + 50, pulled=rows + 50, sent_tokens=(rows + 50) * 10,
            prompt_tokens=rows * 10, output_tokens=rows * 10, commits=2, commit_seconds=0.5, errors={"NULL_PROMPT": 3},
        ),
        "engines": [worker.engine for worker in workers],
    }  # fmt: skip
    return Progress(**{**values, **more})


def exported(*seen: Progress) -> dict[str, Metric]:
    """What the last of so many scrapes reads, one after each look at the run."""
    exporter = Exporter({"model": "m", "output": "o"})
    registry = CollectorRegistry()
    registry.register(exporter)
    for now in seen:
        exporter.on_progress(now)
        text = generate_latest(registry).decode()
    return {family.name: family for family in text_string_to_metric_families(text)}


def value(families: dict[str, Metric], name: str, sample: str | None = None, **labels: str) -> float:
    (found,) = [
        s.value
        for s in families[name].samples
        if s.name == (sample or name) and labels.items() <= s.labels.items()
    ]
    return found


def test_names_types_and_units_are_in_prometheus_own_style():
    for name, family in exported(at(1, 100), at(2, 200)).items():
        assert re.fullmatch(r"batchrun_[a-z_]+", name), name
        assert family.documentation.endswith("."), name
        assert not re.search(
            r"_(ms|millis|minutes|percent|kb|mb|gb|kib|mib|gib|count|total|info)$", name
        ) or (name == "batchrun_run_info")
        samples = {sample.name for sample in family.samples}
        if family.type == "counter":
            assert samples == {f"{name}_total"}, "a counter, and only a counter, ends with _total"
        assert family.type in ("counter", "gauge", "summary"), name


def test_each_value_is_the_runs_or_the_workers_own():
    families = exported(at(1, 100), at(2, 200))
    assert value(families, "batchrun_rows_generated", "batchrun_rows_generated_total") == 200
    assert value(families, "batchrun_rows_failed", "batchrun_rows_failed_total", code="NULL_PROMPT") == 3
    assert value(families, "batchrun_commit_seconds", "batchrun_commit_seconds_sum") == 0.5
    assert value(families, "batchrun_partitions", state="waiting") == 5
    assert value(families, "batchrun_engine_waiting_requests", host="10.0.0.2") == 10
    assert value(families, "batchrun_gpu_utilization_ratio", worker="tcp://10.0.0.1:9000") == 0.75
    assert value(families, "batchrun_remaining_seconds") == pytest.approx(8, rel=0.5)


def test_without_a_gpu_there_are_no_gpu_values():
    families = exported(at(1, 100, worker_views=worker_views(100, card=None)))
    assert not [s for name, family in families.items() if "gpu" in name for s in family.samples]


def test_counters_never_fall_when_a_lost_attempt_takes_its_rows_along():
    families = exported(at(1, 500), at(2, 400, counts=Counters(rows=400)))
    assert value(families, "batchrun_rows_generated", "batchrun_rows_generated_total") == 500
    assert value(families, "batchrun_rows_failed", "batchrun_rows_failed_total", code="NULL_PROMPT") == 3


def test_every_metric_that_the_dashboard_asks_for_is_exported():
    there = {s.name for family in exported(at(1, 100), at(2, 200)).values() for s in family.samples}
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    expressions += [
        v["query"]["query"] for v in dashboard["templating"]["list"] if isinstance(v["query"], dict)
    ]
    asked = {name for expression in expressions for name in re.findall(r"batchrun_\w+", expression)}
    assert len(asked) > 15
    assert asked <= there


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def test_a_run_serves_its_workers_metrics_and_stops_serving_when_it_ends(tmp_path, tiny_llama, cluster):
    port = free_port()
    job = write_job(
        tmp_path, tiny_llama, engine={"kind": "engines:SecondsEngine"}, cluster={"metrics_port": port}
    )
    address, texts = f"http://127.0.0.1:{port}/metrics", []
    stop = threading.Event()

    def on_progress(now: Progress) -> None:
        if not stop.is_set():  # the last look comes when all have stopped
            texts.append(urllib.request.urlopen(address, timeout=10).read().decode())
            with pytest.raises(ConnectionRefusedError):  # nobody listens on any other interface
                socket.create_connection(("127.0.0.2", port), timeout=10)
        if now.counts.rows > 3 and now.engines:
            stop.set()

    with pytest.raises(library.errors.Interrupted):
        library.run(job, client=cluster, stop=stop, on_progress=on_progress)
    families = {family.name: family for family in text_string_to_metric_families(texts[-1])}
    assert value(families, "batchrun_rows_planned") == ROWS
    assert value(families, "batchrun_rows_generated", "batchrun_rows_generated_total") > 3
    worker = next(iter(cluster.scheduler_info()["workers"]))
    assert value(families, "batchrun_worker_tasks", worker=worker) > 0
    assert (
        value(families, "batchrun_engine_output_tokens", "batchrun_engine_output_tokens_total", worker=worker)
        > 0
    )
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(address, timeout=5)


def test_metrics_are_served_elsewhere_where_the_job_says_so(tmp_path, tiny_llama):
    port = free_port()
    prepared = prepare(load(write_job(tmp_path, tiny_llama, rows=4)))
    with serve(f"0.0.0.0:{port}", prepared):
        socket.create_connection(("127.0.0.2", port), timeout=10).close()


def test_a_port_that_is_taken_is_refused_by_its_key(tmp_path, tiny_llama, cluster):
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        job = write_job(tmp_path, tiny_llama, cluster={"metrics_port": taken.getsockname()[1]})
        with pytest.raises(ClusterError, match=r"cluster\.metrics_port"):
            library.run(load(job), client=cluster)


@pytest.fixture
def logged() -> Iterator[Callable[..., None]]:
    """Configures logs as a command does."""
    before = logging.getLogger().handlers[:]
    yield logs.configure
    logging.basicConfig(handlers=before, force=True)
    logging.getLogger("batchrun").setLevel(logging.NOTSET)


def test_why_a_store_cannot_be_written_to_is_told_once_in_one_line(capsys, logged):
    logged("text", Redactor())
    for what, key in [("no space left", "a"), ("no space left", "b"), ("access denied", "a")]:
        logging.getLogger("batchrun").warning("%s is lost: %s", key, StorageError(what, f"/out/{key}"))
    logging.getLogger("some.library").warning("old")
    assert capsys.readouterr().err.splitlines() == [
        "warning: a is lost: /out/a: no space left",
        "warning: a is lost: /out/a: access denied",
        "warning some.library: old",
    ]


def test_json_log_lines_are_one_object_each_and_keep_secrets(capsys, logged):
    redact = Redactor()
    redact.add(["planted-s3cret"])
    logged("json", redact)
    logging.getLogger("some.library").warning("token %s\nin two lines", "planted-s3cret")
    rates = Rates()
    rates.add(at(1, 100))
    logs.progress_event(at(1, 100), rates)
    first, second = (json.loads(line) for line in capsys.readouterr().err.splitlines())
    assert (first["level"], first["message"]) == ("warning", "token ***\nin two lines")
    assert (second["event"], second["rows_done"], second["errors"]) == ("progress", 100, {"NULL_PROMPT": 3})


@pytest.fixture
def nvml(monkeypatch) -> Iterator[list[object]]:
    """A machine with NVML and one GPU; the list is which GPUs were asked for."""
    asked: list[object] = []

    def by(which: object) -> str:
        asked.append(which)
        return "handle"

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", by)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", by)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda handle: "H200")
    memory = SimpleNamespace(used=3, total=4)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", lambda handle: memory)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", lambda handle: SimpleNamespace(gpu=50))
    gpu._handle.cache_clear()
    yield asked
    gpu._handle.cache_clear()


@pytest.mark.parametrize(("visible", "which"), [(None, 0), ("3,1", 3), ("GPU-8d1c,GPU-1", "GPU-8d1c")])
def test_the_workers_own_gpu_is_sampled(nvml, monkeypatch, visible, which):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.gpu_now() == Gpu("H200", 0.5, 3, 4)
    assert nvml == [which]


@pytest.mark.parametrize("visible", ["", "-1"])
def test_a_worker_that_may_use_no_gpu_samples_none(nvml, monkeypatch, visible):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu.gpu_now() is None
    assert nvml == []


def test_what_a_gpu_cannot_say_is_left_out_and_a_lost_one_too(nvml, monkeypatch):
    def not_supported(handle: object) -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetUtilizationRates", not_supported)
    found = gpu.gpu_now()
    assert found is not None
    assert found.use is None
    monkeypatch.setattr(pynvml, "nvmlDeviceGetMemoryInfo", not_supported)
    assert gpu.gpu_now() is None
