"""Money, rates, records and metrics count GPUs, of which an engine may have several."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pynvml
import pytest
from prometheus_client import CollectorRegistry, generate_latest

from batchrun.commands.status import _run_lines
from batchrun.counters import Counters
from batchrun.driver.limits import Limits
from batchrun.engine.protocol import EngineStats
from batchrun.errors import Interrupted
from batchrun.output import document
from batchrun.report import bill, summary
from batchrun.report.live import View
from batchrun.report.result import RunResult
from batchrun.storage import Folder
from batchrun.telemetry import gpu, record
from batchrun.telemetry.gpu import Gpu, gpu_now
from batchrun.telemetry.progress import Progress, WorkerView
from batchrun.telemetry.prometheus import Exporter
from batchrun.telemetry.rates import Rates
from batchrun.telemetry.record import RunRecord
from batchrun.telemetry.redact import Redactor
from jobs import load, write_job

TWO_HOURS = 7200.0


def progress(seconds: float, workers: int, each: int, rows: int = 10) -> Progress:
    return Progress(
        seconds=seconds, partitions=4, partitions_done=1, partitions_in_flight=2, rows=40, rows_done=rows,
        counts=Counters(rows=rows, prompt_tokens=10 * rows, output_tokens=5 * rows), workers=workers,
        gpus_per_worker=each, worker_time={"generating": seconds * workers},
        worker_views=[
            WorkerView(f"tcp://10.0.0.{i}:9000", "host", 2, 2, 1 << 30, "generating", EngineStats(pid=1),
                       Gpu("H100", i / 4, 30 << 30, each * (80 << 30), each))
            for i in range(1, workers + 1)
        ],
    )  # fmt: skip


@pytest.fixture
def cards(monkeypatch):
    """NVML's cards by index: their use in per cent, and bytes in use; each has 100."""
    found: dict[object, tuple[int, int]] = {}

    def handle(which):
        if which not in found:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return which

    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByIndex", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", handle)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetName", lambda which: f"card {which}")
    used = "nvmlDeviceGetMemoryInfo"
    monkeypatch.setattr(pynvml, used, lambda which: SimpleNamespace(used=found[which][1], total=100))
    rates = "nvmlDeviceGetUtilizationRates"
    monkeypatch.setattr(pynvml, rates, lambda which: SimpleNamespace(gpu=found[which][0]))
    gpu._handle.cache_clear()
    yield found
    gpu._handle.cache_clear()


def test_all_of_an_engines_gpus_are_watched_and_no_others(cards, monkeypatch):
    cards |= {0: (100, 7), 1: (50, 10), 2: (100, 30), "MIG-a": (0, 1)}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,2,0")
    assert gpu_now() == Gpu("card 1", 0.5, 10, 100)
    assert gpu_now(2) == Gpu("card 1", 0.75, 40, 200, 2), "the mean use, the sum of memory"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,MIG-a")
    assert gpu_now(2) == Gpu("card 1", 0.25, 11, 200, 2)
    assert gpu_now(4) == Gpu("card 1", 0.25, 11, 200, 2), "as many as there are"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,-1,1")
    assert gpu_now(3) == Gpu("card 2", 1.0, 30, 100), "as CUDA reads it"
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert gpu_now(2) == Gpu("card 0", 0.75, 17, 200, 2)


def test_means_and_money_of_a_run_weigh_gpus_not_workers(tmp_path, tiny_llama):
    now = replace(progress(TWO_HOURS, 2, 2), worker_views=[
        WorkerView("a", "host", 1, 2, 1, "idle", None, Gpu("H100", 1.0, 30, 40, 3)),
        WorkerView("b", "host", 1, 2, 1, "idle", None, Gpu("H100", 0.0, 10, 40, 1)),
    ])  # fmt: skip
    assert now.gpu_use == 0.75
    assert now.gpu_memory == 0.5
    assert (now.gpus, now.gpu_seconds) == (4, 4 * TWO_HOURS)
    rates = Rates()
    rates.add(now)
    assert rates.cost(2.5)[0] == pytest.approx(2.5 * 8)
    job = load(write_job(tmp_path, tiny_llama), "limits.max_cost=20", "cluster.price_per_gpu_hour=2.5")
    limits = Limits(job, 0.0)
    limits.on_progress(replace(now, worker_time={"generating": 2 * TWO_HOURS - 2}))
    with pytest.raises(Interrupted, match=r"8.00 GPU hours cost 20.00"):
        limits.on_progress(now)


def run_of(each: int) -> RunRecord:
    return RunRecord(
        "a" * 32, "2026-01-01T00:00:00Z", "complete", 3600.0, counts=Counters(rows=1000, prompt_tokens=4000),
        workers=2, gpus_per_worker=each, device="NVIDIA H100", worker_time={"loading": 720.0, "generating": 6480.0},
        price_per_gpu_hour=2.0,
    )  # fmt: skip


def test_a_bill_and_a_status_are_those_of_gpus():
    assert run_of(1).cost == pytest.approx(4.0)
    assert run_of(4).cost == pytest.approx(16.0)
    loading, _, _, whole = bill.lines([run_of(4)])
    assert (loading.seconds, loading.share) == (4 * 720.0, 0.1)
    assert (whole.seconds, whole.cost) == (4 * 7200.0, pytest.approx(16.0))
    *_, both = bill.lines([run_of(4), run_of(1)])
    assert both.cost == pytest.approx(20.0)
    assert "2 workers of 4 GPUs, cost 16.00" in next(_run_lines(run_of(4)))
    assert "2 workers, cost 4.00" in next(_run_lines(run_of(1)))


def test_a_record_from_before_engines_had_several_gpus_is_read_as_one_of_one(tmp_path):
    folder = Folder(str(tmp_path))
    record.write(folder, run_of(4), Redactor())
    (found,) = record.read_all(folder)
    assert found == run_of(4)
    values = document.decode(folder.read(found.key))
    del values["gpus_per_worker"]
    folder.put(found.key, document.encode(values))
    assert record.read_all(folder) == [run_of(1)]


def test_metrics_count_gpus():
    exporter = Exporter({})
    exporter.on_progress(progress(100.0, 3, 2))
    registry = CollectorRegistry()
    registry.register(exporter)
    text = generate_latest(registry).decode()
    assert "batchrun_gpus 6.0" in text
    assert "batchrun_gpu_seconds_total 600.0" in text
    assert "batchrun_workers 3.0" in text


def test_the_live_view_and_the_end_of_a_run_tell_of_gpus(tmp_path, tiny_llama):
    view = View(load(write_job(tmp_path, tiny_llama)))
    view.rates.add(progress(10.0, 1, 2))
    assert "2 GPUs 25% busy, 19% full" in view._worker(progress(10.0, 1, 2).worker_views[0])
    assert "GPU 25% busy, 38% full" in view._worker(progress(10.0, 1, 1).worker_views[0])
    result = RunResult(
        "out", 10, 10, 0, 1, 100, 50, {}, {}, 9.0, counts=Counters(rows=10, prompt_tokens=100, output_tokens=50),
        gpus_per_engine=2, gpu_seconds=15.0,
    )  # fmt: skip
    assert result.tokens_per_gpu_second == 10.0
    assert "10 tokens/s in and out per GPU (2 per engine)" in "\n".join(summary.run_lines(result))
    alone = replace(result, gpus_per_engine=1)
    assert "per GPU" not in "\n".join(summary.run_lines(alone))
