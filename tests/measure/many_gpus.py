"""What one driver, one scheduler and one store bear: a run on many simulated GPUs, each a process that only waits.

    python -m tests.measure.many_gpus [--workers 64] [--stretch 4] [--tasks 6] [--burst 2000] [--folder FOLDER]

A real `batchrun run` with a Dask scheduler of its own, an S3 server (moto) that counts requests, and workers whose
engines finish rows at a set speed. A row stands for many: partitions have `--part-rows` rows instead of 8,192, and
engines finish them as much more slowly, so that a partition takes each GPU as long and is staged as often as at
ROWS_PER_SECOND of real rows. On few cores time is stretched: N workers are the load of N / stretch GPUs.

Simulated: CPU seconds (the kernel's, by process) while every worker has work, and requests. The driver's seconds are
told apart by what it does (`timed_driver`), and what it does each second is measured with the heartbeats of more
workers, copies of the real ones. Calculated from these units: what so many GPUs ask of each part, see `load`.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from distributed import Client
from distributed.scheduler import heartbeat_interval

from batchrun.driver.receipts import ReceiptReader
from batchrun.driver.workers import look_at

sys.path.append("tests/support")

# Of one H200 with the Qwen3-0.6B shape and 32 new tokens a row: jobs/PERFORMANCE.md.
ROWS_PER_SECOND = 1762.0
ROWS_PER_PART = 8192
GPUS = (64, 256, 1024)
# Seconds in which the workers do nothing, and looks at them and receipts without anything else going on.
CALM, LOOKS, RECEIPTS = 10.0, 20, 200
# Requests per second that S3 promises for each partition of a bucket's keys, as it begins with one:
# https://docs.aws.amazon.com/AmazonS3/latest/userguide/optimizing-performance.html
WRITES, READS = 3500, 5500
# Heartbeats per second that Dask's scheduler asks for at most.
BEATS = 200


def main() -> None:
    args = parse_arguments()
    # So that what was started ends with this.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by a signal"))
    with tempfile.TemporaryDirectory(prefix="batchrun-many-") as scratch:
        folder = args.folder or Path(scratch)
        print(f"{os.cpu_count()} CPU cores; time stretched {args.stretch:g} times", flush=True)
        units = measure(folder, args.workers, args.tasks, args.part_rows, args.stretch, args.burst)
        (folder / "units.json").write_text(json.dumps(units, indent=1))
        show(units)


def measure(
    folder: Path, workers: int, tasks: int, part_rows: int, stretch: float, burst: int
) -> dict[str, Any]:
    """The units of a run on so many workers, `tasks` partitions each, and of one of `burst` tiny partitions; either may
    be left out."""
    from simulated_gpus import simulated_gpus

    rate = ROWS_PER_SECOND * part_rows / ROWS_PER_PART / stretch
    units: dict[str, Any] = {"workers": workers, "tasks": workers * tasks, "stretch": stretch}
    seen = {}
    with simulated_gpus(folder, workers, rate) as gpus:
        gpus.write_job(max(1, workers * tasks), part_rows, flush_seconds=15.0 * stretch)
        if tasks:
            before = Counter(gpus.requests())
            seen["paced"] = gpus.run("out")
            units["requests"] = dict(sorted((Counter(gpus.requests()) - before).items()))
            units["gap"] = gaps(folder / "tasks", busy(seen["paced"][0], workers))
        if burst:
            seen["burst"] = run_burst(gpus, burst)
        units |= {"memory": gpus.memory(), "start": gpus.start, **measure_calm(gpus, workers)}
    for name, (looks, samples) in seen.items():
        units[name] = steady(looks, samples, workers, units["scheduler"])
        units["start"].setdefault("registered", looks[-1]["register"][3])
        end = next(look for look in looks if "many" in look)
        units |= {name: end[name] for name in ("many", "task_bytes", "receipt_bytes")}
    return units


def run_burst(gpus: Any, partitions: int) -> tuple[list[dict[str, Any]], list[dict[str, float]]]:
    """A run of tasks as short as they get, each a partition of a row: what it costs to have a task done, apart from
    what goes on in any second."""
    from timed_driver import ALONE

    rows = gpus.folder / "burst.parquet"
    texts = [f"row {i}" for i in range(partitions)]
    pq.write_table(pa.table({"text": texts}), rows, row_group_size=100)
    changes = {
        "input.path": rows,
        "input.storage_options": "{}",
        "output.path": gpus.folder / "burst",
        "output.storage_options": "{}",
        "output.rows_per_part": 1,
        "engine.kind": "batchrun.engine.instant:InstantEngine",
    }
    words = [word for key, value in changes.items() for word in ("--set", f"{key}={value}")]
    found: tuple[list[dict[str, Any]], list[dict[str, float]]] = gpus.run("burst", *words, **{ALONE: "1"})
    return found


def measure_calm(gpus: Any, workers: int) -> dict[str, dict[str, float]]:
    """Where nobody has work, CPU seconds: of the scheduler with nobody there, for a heartbeat, and for telling a client
    of a worker; of scheduler and client together for a receipt that is read alone, or along with all others, and
    seconds on the clock."""
    with Client(gpus.address, set_as_default=False) as client:
        before, began = gpus.cpu("scheduler"), time.monotonic()
        time.sleep(CALM)
        idle = (gpus.cpu("scheduler") - before) / (time.monotonic() - began)
        before, began = gpus.cpu("scheduler"), time.monotonic()
        for _ in range(LOOKS):
            look_at(client, {})
        used = gpus.cpu("scheduler") - before - idle * (time.monotonic() - began)
        beats = workers / heartbeat_interval(workers)
        scheduler = {"idle": gpus.scheduler_idle, "heartbeat": max(0.0, idle - gpus.scheduler_idle) / beats,
                     "look": used / LOOKS / workers}  # fmt: skip
        receipts = {}
        for how in ("alone", "together"):
            futures = client.map(bytes, [400] * RECEIPTS, pure=False)
            while not all(future.done() for future in futures):
                time.sleep(0.1)
            before, began = gpus.cpu("scheduler") + time.process_time(), time.monotonic()
            reader = ReceiptReader(threading.Event())
            for i, future in enumerate(futures):
                reader.read(future, futures[i + 1 :] if how == "together" else ())
            seconds = time.monotonic() - began
            used = gpus.cpu("scheduler") + time.process_time() - before - idle * seconds
            receipts |= {f"{how}, CPU": used / RECEIPTS, f"{how}, clock": seconds / RECEIPTS}
    return {"scheduler": scheduler, "receipts": receipts}


def steady(
    looks: list[dict[str, Any]], samples: list[dict[str, float]], workers: int, calm: dict[str, float]
) -> dict[str, float]:
    """CPU seconds of driver, scheduler and workers for a task while all slots are taken, from when each worker has done
    one; of driver and scheduler without what goes on in any second."""
    inside = busy(looks, workers)
    first, last = inside[0], inside[-1]
    seconds, tasks = last["at"] - first["at"], max(1, last["parts"] - first["parts"])

    def spent(name: str) -> list[float]:
        return [now - then for now, then in zip(last[name], first[name], strict=True)]

    def used(name: str) -> float:
        at = [sample["at"] for sample in samples]
        then, now = np.interp([first["at"], last["at"]], at, [sample[name] for sample in samples])
        return float(now - then)

    polls, here, loop, wall = spent("_poll")
    driver = last["process"] - first["process"]
    beats = workers / heartbeat_interval(workers)
    always = seconds * (calm["idle"] + beats * calm["heartbeat"]) + polls * workers * calm["look"]
    return {
        "seconds": seconds,
        "tasks_per_second": tasks / seconds,
        "driver_cores": driver / seconds,
        "driver_look": (here + loop) / polls,
        "driver_look_seconds": wall / polls,
        "driver_task": (driver - here) / tasks,
        "scheduler_cores": used("scheduler") / seconds,
        "scheduler_task": (used("scheduler") - always) / tasks,
        "worker_task": used("workers") / tasks,
    }


def busy(looks: list[dict[str, Any]], workers: int) -> list[dict[str, Any]]:
    """Those of a run's looks at which each worker has done a task, and has as many as it takes."""
    from forked_workers import SLOTS

    told = [look for look in looks if "todo" in look]
    tasks = told[-1]["parts"]
    return [look for look in told if workers <= look["parts"] <= tasks - SLOTS * workers]


def gaps(folder: Path, looks: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds from the end of a task to the next one that its worker begins, while all slots are taken."""
    times = [look["at"] for look in looks]
    found: list[float] = []
    for file in folder.iterdir():
        ended: list[float] = []
        for line in file.read_text().splitlines():
            at, what = float(line.split()[0]), line.split()[1]
            if what == "ends" and times[0] <= at <= times[-1]:
                ended.append(at)
            elif what == "begins" and ended:
                found.append(at - ended.pop(0))
    return {"median": statistics.median(found), "most": max(found), "count": len(found)}


def load(units: dict[str, Any], gpus: int, rows_per_part: int = ROWS_PER_PART) -> dict[str, float]:
    """What so many GPUs ask of driver, scheduler and store: cores, requests and bytes per second.

    The driver's look at the workers is measured for so many; the rest grows with tasks or with workers.
    """
    tasks = gpus * ROWS_PER_SECOND / rows_per_part
    look = next(one for one in units["many"] if one["workers"] == gpus)
    beats = gpus / heartbeat_interval(gpus)
    asked, calm, task = per_part(units), units["scheduler"], units["burst"]
    return {
        "tasks": tasks,
        "driver, looks": look["show"] + look["loads"],
        "driver, tasks": tasks * task["driver_task"],
        "scheduler, heartbeats": calm["idle"] + beats * calm["heartbeat"],
        "scheduler, looks": gpus * calm["look"],
        "scheduler, tasks": tasks * task["scheduler_task"],
        "writes": tasks * asked["writes"],
        "reads": tasks * asked["reads"],
        "reads of the input": tasks * asked["input"],
        "bytes to the driver": look["bytes"] + tasks * (units["task_bytes"] + units["receipt_bytes"]),
    }


def saturated(units: dict[str, Any]) -> dict[str, float]:
    """At how many GPUs each has no more to give: a core for the driver, one for the scheduler, one for both where they
    share a process, and what S3 promises for the keys of output and input together."""
    tasks, asked = ROWS_PER_SECOND / ROWS_PER_PART, per_part(units)
    look, calm, task = units["many"][-1], units["scheduler"], units["burst"]
    driver = (look["show"] + look["loads"]) / look["workers"] + tasks * task["driver_task"]
    scheduler = calm["look"] + tasks * task["scheduler_task"]
    left = 1 - calm["idle"] - BEATS * calm["heartbeat"]
    return {
        "driver": 1 / driver,
        "scheduler": left / scheduler,
        "both in one process": left / (driver + scheduler),
        "writes": WRITES / tasks / asked["writes"],
        "reads": READS / tasks / (asked["reads"] + asked["input"]),
    }


def per_part(units: dict[str, Any]) -> dict[str, float]:
    """Requests for each partition by what S3 limits them as, in the output and in the input. Parts are read by the
    run's report, a few of them."""
    found = {"writes": 0.0, "reads": 0.0, "input": 0.0}
    for name, count in units["requests"].items():
        kind, place = name.split(" ", 1)
        if not place.startswith(("out/data", "out/_job/stage", "in", "bucket")) or name == "GET out/data":
            continue
        what = "input" if place.startswith("in") else "reads" if kind in ("GET", "HEAD", "LIST") else "writes"
        found[what] += count / units["tasks"]
    return found


def show(units: dict[str, Any]) -> None:
    print(json.dumps(units, indent=1))
    if "requests" not in units or "burst" not in units:
        return
    loads = [load(units, gpus) for gpus in GPUS]
    print(f"{'calculated':32}" + "".join(f"{gpus:>10,} GPUs" for gpus in GPUS))
    for name in loads[0]:
        print(f"{name:32}" + "".join(f"{one[name]:15,.3f}" for one in loads))
    for name, gpus in saturated(units).items():
        print(f"{name + ', no more at':32}{gpus:15,.0f} GPUs")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=64)
    parser.add_argument("--stretch", type=float, default=4.0, help="how many times slower than a GPU")
    parser.add_argument("--tasks", type=int, default=6, help="partitions of each worker")
    parser.add_argument("--part-rows", type=int, default=64)
    parser.add_argument("--burst", type=int, default=2000, help="tiny partitions, one by one")
    parser.add_argument("--folder", type=Path, help="an empty one, kept; otherwise a temporary one")
    return parser.parse_args()


if __name__ == "__main__":
    main()
