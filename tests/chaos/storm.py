"""One round: a job that has to come through a storm of faults, and what must hold then."""

from __future__ import annotations

import random
import re
import signal
import time
from collections import Counter
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import yaml

from tests.support.jobs import dataset

from .check import Violation, Watcher
from .processes import SLOTS, TTL, Cluster, Driver, below, environment, send
from .proxy import FaultyProxy
from .schedule import Event, events

ROWS, PART_ROWS, WORKERS = 800, 20, 2
DELAY = 0.06  # seconds that an engine takes over a row
STORM = 300.0  # seconds at most; it ends earlier when the job comes through, or after
LEAST, ENOUGH = 40.0, 100  # so many seconds, if there were so many faults by then
STARTING = 0.25  # how fast the clock of events goes while no engine works: also what only starts is hit
CALM = 240.0  # seconds in which a run without faults must have ended
PAUSE = TTL + 4.0
LOOK = 0.5
EVERYTHING = WORKERS * SLOTS * PART_ROWS  # rows in flight: none of them need be staged


@dataclass
class Result:
    """A round that came through. `allowed` is how many requests its faults can explain."""

    seed: str
    kind: str
    rows: int = ROWS
    runs: int = 0
    requests: int = 0
    allowed: int = ROWS
    seconds: float = 0.0
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)


class Round:
    """`execute` once. Every process it started is gone afterwards."""

    def __init__(
        self, seed: str, folder: Path, proxy: FaultyProxy, client: Any, model: Path, only: Collection[str]
    ) -> None:
        rng = random.Random(f"round {seed}")
        self.kind = rng.choice(["address", "local"])
        self.result = Result(seed, self.kind)
        self.proxy, self.client, self.only, self.folder = proxy, client, only, folder
        folder.mkdir()
        (folder / "log").mkdir()
        self.env = environment(BATCHRUN_TEST_LOG=str(folder / "log"), BATCHRUN_TEST_DELAY=str(DELAY))
        self.job = self._write_job(seed, model)
        self.watcher = Watcher(client, "chaos", f"{seed}/out", dataset(ROWS), PART_ROWS)
        self.cluster: Cluster | None = None
        self.drivers: list[Driver] = []
        self.paused: dict[int, float] = {}  # pid: when it goes on
        self.complete = False

    def execute(self) -> Result:
        """Raises Violation."""
        started = time.monotonic()
        try:
            if self.kind == "address":
                self.cluster = Cluster(WORKERS, self.folder, self.env)
            stale = self.proxy.stale_stage_lists
            before = Counter(self.proxy.faults)
            self.proxy.storm(self.result.seed)
            self._storm(started, before)
            self.proxy.calm()
            self.result.faults += self.proxy.faults - before
            self.result.allowed += (self.proxy.stale_stage_lists - stale) * PART_ROWS
            self._calm()
            self.watcher.finish()
            self._count_requests()
        finally:
            self.proxy.calm()
            self._stop()
        self.result.seconds = time.monotonic() - started
        return self.result

    def _storm(self, started: float, before: Counter[str]) -> None:
        coming = events(self.result.seed, self.only)
        event = next(coming, None)
        clock, looked = 0.0, time.monotonic()
        while not self.complete:
            lasted = time.monotonic() - started
            faults = (self.proxy.faults - before).total() + self.result.faults.total()
            if lasted > STORM or (lasted > LEAST and faults >= ENOUGH):
                break
            self._reap()
            if not self.drivers and not self.complete:
                self._drive()
            passed = time.monotonic() - looked
            if passed >= LOOK:
                looked += passed
                clock += passed if self._targets("engine") else passed * STARTING
                self.watcher.look()
                if event is not None and clock >= event.at:
                    self._strike(event)
                    event = next(coming)
            self._tend()
            time.sleep(0.1)

    def _calm(self) -> None:
        """Nothing goes wrong any more: what still runs ends by itself, and then one more run completes."""
        for pid in self.paused:
            send(pid, signal.SIGCONT)
        self.paused.clear()
        deadline = time.monotonic() + CALM
        while self.drivers:
            self._wait(deadline)
        if not self.complete:
            self._drive()
            while self.drivers:
                self._wait(deadline)
        if not self.complete:
            raise Violation(f"the run after all faults failed: {dict(self.result.ends)}")

    def _wait(self, deadline: float) -> None:
        self._reap()
        self._tend()
        self.watcher.look()
        if time.monotonic() > deadline:
            raise Violation(f"a run hangs without any faults: {self.drivers[0].last_words}")
        time.sleep(0.2)

    def _drive(self, *words: str) -> None:
        if self.cluster is not None:
            words = (*words, "--address", self.cluster.address)
        self.drivers.append(Driver(self.job, self.folder, self.env, *words))
        self.result.runs += 1

    def _reap(self) -> None:
        for driver in [d for d in self.drivers if d.ended is not None]:
            self.drivers.remove(driver)
            text = driver.log.read_text(errors="replace")
            if re.search(r"error: (\S+: )?unexpected ", text) or driver.ended == 3:
                raise Violation(f"a run ended with {driver.ended}: {driver.last_words}")
            if driver.ended == 0:
                self.complete = True
            else:
                self.result.allowed += EVERYTHING
            words = re.sub(r"\d+", "N", driver.last_words.rpartition("error: ")[2])
            self.result.ends[f"{driver.ended}: {words}" if driver.ended else "0"] += 1

    def _tend(self) -> None:
        if self.cluster is not None:
            self.cluster.fix()
        for pid, when in list(self.paused.items()):
            if time.monotonic() >= when:
                send(pid, signal.SIGCONT)
                del self.paused[pid]

    def _strike(self, event: Event) -> None:
        """Does what the event says to one of the processes there are; nothing where there are none."""
        kind = event.kind
        if kind == "second-driver":
            if len(self.drivers) == 1:
                self._drive("--force")
                self._fault(kind, ROWS)
            return
        targets = self._targets(kind.partition("-")[0])
        if not targets:
            return
        pid = targets[int(event.choice * len(targets))]
        if kind == "worker-pause":
            self.paused[pid] = time.monotonic() + PAUSE
        number = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "pause": signal.SIGSTOP}
        if send(pid, number[kind.partition("-")[2]]):
            whole = kind in ("driver-kill", "driver-term", "scheduler-kill")
            self._fault(kind, EVERYTHING if whole else SLOTS * PART_ROWS)

    def _targets(self, what: str) -> list[int]:
        drivers = [driver.process.pid for driver in self.drivers]
        if what == "driver":
            return drivers
        if what == "scheduler":
            return [self.cluster.scheduler.pid] if self.cluster else []
        roots = drivers if self.cluster is None else [w.pid for w in self.cluster.workers]
        found = [process.pid for process in below(roots)[what]]
        if what == "worker" and self.cluster is not None:
            found = [worker.pid for worker in self.cluster.workers if worker.poll() is None]
        return [pid for pid in found if pid not in self.paused]

    def _fault(self, kind: str, rows: int) -> None:
        """Counts a fault, which at worst has so many rows generated again."""
        self.result.faults[kind] += 1
        self.result.allowed += rows

    def _count_requests(self) -> None:
        for file in (self.folder / "log").iterdir():
            self.result.requests += sum(1 for line in file.read_text().splitlines() if " " in line)
        if not ROWS <= self.result.requests <= self.result.allowed:
            raise Violation(f"{self.result.requests} requests, where faults explain {self.result.allowed}")

    def _stop(self) -> None:
        for pid in self.paused:
            send(pid, signal.SIGCONT)
        children = below([driver.process.pid for driver in self.drivers])
        for driver in self.drivers:
            driver.process.kill()
            driver.process.wait()
        if self.cluster is not None:
            self.cluster.stop()
        for process in [*children["worker"], *children["engine"]]:
            with suppress(psutil.Error):
                process.kill()

    def _write_job(self, seed: str, model: Path) -> Path:
        file = self.folder / "in.parquet"
        pq.write_table(dataset(ROWS), file, row_group_size=2 * PART_ROWS)
        self.client.upload_file(str(file), "chaos", f"{seed}/in/a.parquet")
        options = {"key": "chaos", "secret": "chaos-secret", "endpoint_url": self.proxy.url}
        job = {
            "input": {"path": f"s3://chaos/{seed}/in/a.parquet", "storage_options": options},
            "prompt": {"template": "{{ text }}"},
            "model": {"name": str(model)},
            "generation": {"max_new_tokens": 64},
            "engine": {"kind": "engines:EchoEngine"},
            "output": {
                "path": f"s3://chaos/{seed}/out",
                "storage_options": options,
                "rows_per_part": PART_ROWS,
                "flush_rows": 4,
                "flush_seconds": 0.5,
            },
            "cluster": {"workers": WORKERS, "slots": SLOTS},
        }
        path = self.folder / "job.yaml"
        path.write_text(yaml.safe_dump(job))
        return path
