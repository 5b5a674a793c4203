"""A killed run loses nothing: SIGKILL to driver, worker and engine at random moments of real runs."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from chaos.processes import below
from warm import WarmCommand

from batchrun.commands.verify import verify
from batchrun.dataset.plan import Plan
from batchrun.dataset.reader import read_partition
from batchrun.output import chunk, identity
from batchrun.output.layout import STAGE, Layout, plan_key
from batchrun.storage import Folder
from jobs import batchrun, check_complete, load, start_driver, write_job

# Another one is taken from the environment: BATCHRUN_TEST_SEED.
SEED = 13
KILLS = 10
ROWS = 240
RUNS = 3  # runs that end by a kill of the driver; the other kills hit workers and engines of a living run


class Watcher:
    """Knows from the outside which rows are staged or committed, and what engines were asked."""

    def __init__(self, folder: Path) -> None:
        self.output, self.log = Folder(str(folder / "out")), folder / "log"
        self.job = load(folder / "job.yaml")
        self.log.mkdir()
        self.durable: dict[int, float] = {}  # row seed: when it was first seen to be durable
        self.plan: Plan | None = None

    def look(self) -> None:
        """Notes the rows that are durable at this moment."""
        if self.plan is None:
            if not self.output.exists(plan_key(0)):
                return
            self.plan = Plan.from_parquet(self.output.read(plan_key(0)))
            self.seeds = [self._seeds(i) for i in range(len(self.plan.partitions))]
        now = time.time()
        pinned = identity.read(self.output)
        layout = Layout(pinned.plan_hash, len(self.plan.partitions))
        for key in self.output.list():
            if (i := layout.partition_of_part(key)) is not None:
                self._note(self.seeds[i], now)
            elif key.startswith(STAGE) and (i := layout.partition_of_chunk(key)) is not None:
                try:
                    data = self.output.read(key)
                except FileNotFoundError:
                    continue  # swept meanwhile: its part is there, and seen the next time
                origin = chunk.Origin(pinned.plan_hash, pinned.job_hash, i)
                rows = chunk.decode(data, origin, len(self.seeds[i]))["row"].to_pylist()
                self._note([self.seeds[i][row] for row in rows], now)

    def requests(self) -> list[tuple[float, int]]:
        """(when, row seed) of every request that any engine process was given."""
        lines = [line for file in self.log.iterdir() for line in file.read_text().splitlines()]
        pairs = [line.split() for line in lines if re.fullmatch(r"[\d.]+ -?\d+", line)]
        return [(float(when), int(seed)) for when, seed in pairs]

    def _note(self, seeds: list[int], now: float) -> None:
        for seed in seeds:
            self.durable.setdefault(seed, now)

    def _seeds(self, index: int) -> list[int]:
        assert self.plan is not None
        partition = self.plan.partitions[index]
        settings = self.job.input
        batches = read_partition(
            partition.slices,
            self.plan.files_of(partition),
            self.plan.schema,
            ["text"],
            None,
            settings.cast,
            {},
            order=partition.places if partition.order else None,
        )
        return [seed for batch in batches for seed in batch.row_ids.view("int64").tolist()]


def family(process: WarmCommand) -> dict[str, list[psutil.Process]]:
    """The run's living processes by what they are."""
    return {"driver": [psutil.Process(process.pid)], **below([process.pid])}


@pytest.mark.timeout(600)
@pytest.mark.parametrize(("order", "count"), [(None, KILLS), ("prefix", KILLS // 2)])
def test_many_kills_of_driver_worker_and_engine_lose_nothing_and_repeat_nothing_staged(
    tmp_path, tiny_llama, order, count
):
    seed = int(os.environ.get("BATCHRUN_TEST_SEED", SEED))
    print(f"BATCHRUN_TEST_SEED={seed}")
    rng = random.Random(seed)
    source = {"path": "in.parquet", "order": order}
    output = {"rows_per_part": 30, "flush_rows": 4}
    job = write_job(tmp_path, tiny_llama, rows=ROWS, row_group=30, input=source, output=output)
    watcher = Watcher(tmp_path)
    environment = {"BATCHRUN_TEST_LOG": str(watcher.log), "BATCHRUN_TEST_DELAY": "0.1"}
    kills = {"driver": 0, "worker": 0, "engine": 0}
    pids: set[int] = set()
    process = start_driver("run", str(job), **environment)
    while sum(kills.values()) < count:
        moment = time.monotonic() + rng.uniform(0.2, 1.5)
        while time.monotonic() < moment:
            watcher.look()
            time.sleep(0.1)
        if process.poll() is not None:
            # Killed so often that a partition made no progress: given up, and resumable like any other end.
            _, err = process.communicate()
            assert "in a row" in err or "again and again" in err, f"seed {seed}: {err}"
            process = start_driver("run", str(job), **environment)
            continue
        members = family(process)
        pids |= {member.pid for group in members.values() for member in group}
        # A driver may die at any moment; workers and engines once there is an engine at work.
        kinds = ["driver"] if kills["driver"] < RUNS else []
        kinds += ["worker", "engine"] if members["engine"] else []
        if not kinds:
            continue
        kind = rng.choice(kinds)
        watcher.look()
        rng.choice(members[kind]).send_signal(signal.SIGKILL)
        kills[kind] += 1
        if kind == "driver":
            process.communicate()
            wait_gone(pids)
            watcher.look()
            process = start_driver("run", str(job), **environment)
    while process.poll() is None:
        watcher.look()
        time.sleep(0.2)
    _, err = process.communicate()
    if process.returncode != 0:  # its last partitions were struck three times without progress
        assert process.returncode == 1, f"seed {seed}: {err}"
        code, _, err = batchrun("run", str(job), **environment)
        assert code == 0, f"seed {seed}: {err}"
    check_complete(tmp_path / "out", ROWS, as_it_stands=order is None)
    assert verify(load(job)).found.passed
    again = [(when, row) for when, row in watcher.requests() if when > watcher.durable.get(row, float("inf"))]
    assert not again, f"seed {seed}: {len(again)} rows generated again that were staged"
    asked = len(watcher.requests())
    assert asked >= ROWS
    print(f"kills {kills}, {asked} requests for {ROWS} rows, {len(watcher.durable)} rows seen durable")


def wait_gone(pids: set[int], seconds: float = 20.0) -> None:
    """No worker or engine outlives its driver: an orphan would keep the GPU's memory."""
    deadline = time.monotonic() + seconds
    while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
        assert time.monotonic() < deadline, "a worker or an engine outlived its driver"
        time.sleep(0.1)
