"""A scheduler, a store and workers whose engines only wait, as processes of this machine, and runs of a job on them."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import s3fs
import yaml
from fleet import fleet, wait_until
from forked_workers import SLOTS
from steady_engine import ROWS_PER_SECOND
from stores import Place, s3_bucket

from jobs import environment
from tests.chaos.processes import free_port

# Seconds between two looks at the processes, and of the scheduler before anybody comes.
SAMPLE, IDLE = 1.0, 5.0
# Threads share one heap, which gives back what it does not need.
LITTLE_MEMORY = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}
MODEL = Path(__file__).parents[2] / "jobs/quickstart/model"


@dataclass
class SimulatedGpus:
    """`start` is what it took until all were there: seconds, CPU seconds of the scheduler. That needs `scheduler_idle`
    cores as long as nobody is there."""

    folder: Path
    address: str
    place: Place
    scheduler: psutil.Process
    store: psutil.Process
    workers: psutil.Process
    scheduler_idle: float
    start: dict[str, float]

    def write_job(self, tasks: int, part_rows: int, flush_seconds: float) -> None:
        """job.yaml and its rows in the store: `tasks` partitions."""
        table = pa.table({"text": [f"row {i}" for i in range(tasks * part_rows)]})
        with s3fs.S3FileSystem(**self.place.options).open(f"{self.place.url}/in/rows.parquet", "wb") as file:
            pq.write_table(table, file, row_group_size=8 * part_rows)
        job = {
            "input": {"path": f"{self.place.url}/in/rows.parquet", "storage_options": self.place.options},
            "prompt": {"template": "Describe: {{ text }}"},
            "model": {"name": str(MODEL)},
            "generation": {"max_new_tokens": 4},
            "engine": {"kind": "steady_engine:SteadyEngine"},
            "output": {
                "path": f"{self.place.url}/out",
                "storage_options": self.place.options,
                "rows_per_part": part_rows,
                "flush_rows": max(1, part_rows // 4),
                "flush_seconds": flush_seconds,
            },
            "cluster": {"address": self.address, "slots": SLOTS},
        }
        (self.folder / "job.yaml").write_text(yaml.safe_dump(job))

    def run(
        self, output: str, *words: str, **env: str
    ) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
        """`batchrun run`: what the driver told (see `timed_driver`), and CPU seconds of the other processes so far,
        those of their children included, every SAMPLE seconds."""
        samples: list[dict[str, float]] = []
        times, log = self.folder / f"{output}.times", self.folder / f"{output}.log"
        command = [sys.executable, "-m", "tests.support.timed_driver", str(times), "run", "job.yaml"]
        command += ["--set", f"output.path={self.place.url}/{output}", *words]
        with log.open("w") as file:
            driver = subprocess.Popen(
                command, cwd=self.folder, env=environment(**env), stdout=file, stderr=file
            )
            while driver.poll() is None:
                samples.append(
                    {"at": time.time(), "scheduler": self.cpu("scheduler"), "workers": self.cpu("workers")}
                )
                time.sleep(SAMPLE)
        if driver.returncode:
            raise RuntimeError(f"the run ended with {driver.returncode}\n{log.read_text()[-3000:]}")
        (self.folder / f"{output}.samples").write_text(json.dumps(samples))
        return [json.loads(line) for line in times.read_text().splitlines()], samples

    def cpu(self, name: str) -> float:
        """CPU seconds so far of the `scheduler`, the `store` or the `workers`, their living children included."""
        process = getattr(self, name)
        return sum(map(_cpu, (process, *process.children(recursive=True))))

    def requests(self) -> dict[str, int]:
        """What the store was asked so far."""
        with urlopen(f"http://{self.place.address}/counts") as answer:
            counts: dict[str, int] = json.load(answer)
        return counts

    def memory(self) -> dict[str, int]:
        """Bytes of all processes together, shared ones once; how many processes the workers are."""
        workers = [self.workers, *self.workers.children(recursive=True)]
        every = [self.scheduler, self.store, *workers]
        return {"bytes": sum(one.memory_full_info().pss for one in every), "processes": len(workers)}


@contextmanager
def simulated_gpus(folder: Path, count: int, rows_per_second: float) -> Iterator[SimulatedGpus]:
    """`count` workers, each engine of which finishes so many rows a second."""
    with ExitStack() as stack:
        cluster = stack.enter_context(fleet(folder))
        scheduler = psutil.Process(cluster.processes[0].pid)
        port = free_port()
        url = f"http://127.0.0.1:{port}"
        store = cluster.start("store", [sys.executable, "-m", "tests.support.counting_s3", str(port)])
        wait_until(lambda: answers(f"{url}/counts"), "the store does not answer")
        before = _cpu(scheduler)
        time.sleep(IDLE)
        idle = (_cpu(scheduler) - before) / IDLE
        began, before = time.monotonic(), _cpu(scheduler)
        words = ["-m", "tests.support.forked_workers", cluster.address, str(count), str(folder / "tasks")]
        (folder / "tasks").mkdir()
        env = {ROWS_PER_SECOND: str(rows_per_second), **LITTLE_MEMORY}
        workers = cluster.start("workers", [sys.executable, *words], **env)
        cluster.wait_for(count)
        start = {"seconds": time.monotonic() - began, "scheduler": _cpu(scheduler) - before}
        processes = (scheduler, *(psutil.Process(one.pid) for one in (store, workers)))
        yield SimulatedGpus(folder, cluster.address, s3_bucket(url, "test", "test"), *processes, idle, start)


def answers(url: str) -> bool:
    with suppress(OSError), urlopen(url, timeout=5):
        return True
    return False


def _cpu(process: psutil.Process) -> float:
    with suppress(psutil.Error):
        used = process.cpu_times()
        return float(used.user + used.system)
    return 0.0
