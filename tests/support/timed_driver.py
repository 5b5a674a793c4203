"""`batchrun` with a clock on its dispatch: `python -m tests.support.timed_driver FILE run job.yaml`.

At each look at the workers it writes a line of JSON to FILE: the process's CPU seconds so far, and of each of CALLS how
often it was called and its CPU seconds, in its own thread and meanwhile in Dask's event loop, and seconds on the clock.
At the end the same look is taken at more workers than there are, copies of real ones: see `look_at_many`. With ALONE
in the environment no two partitions share a task, however short they are.
"""

from __future__ import annotations

import copy
import json
import os
import pickle
import statistics
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

from batchrun.model import light

ALONE = "BATCHRUN_TEST_ALONE"
CALLS = ("_poll", "_take", "_fill")
MANY = (64, 256, 1024)
LOOKS = 9


class Clock:
    """What was spent: by name, [calls, seconds of CPU here, of the event loop's, seconds]."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("a", buffering=1)
        self.spent: dict[str, list[float]] = defaultdict(lambda: [0, 0.0, 0.0, 0.0])
        self._loop = 0.0

    def loop(self) -> float:
        """CPU seconds of Dask's event loop so far, as long as there is one."""
        for thread in threading.enumerate():
            if thread.name == "IO loop" and thread.ident:
                self._loop = time.clock_gettime(time.pthread_getcpuclockid(thread.ident))
        return self._loop

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def call(*args: Any, **named: Any) -> Any:
            before = (time.thread_time(), self.loop(), time.perf_counter())
            try:
                return function(*args, **named)
            finally:
                now = (time.thread_time(), self.loop(), time.perf_counter())
                spent = self.spent[name]
                spent[0] += 1
                spent[1:] = [
                    old + after - then for old, after, then in zip(spent[1:], now, before, strict=True)
                ]

        return call

    def tell(self, **facts: Any) -> None:
        cpu = {"process": time.process_time(), "loop": self.loop()}
        self.file.write(json.dumps({"at": time.time(), **cpu, **facts, **self.spent}) + "\n")


def install(clock: Clock) -> None:
    """Puts the clock on what the driver does from now on."""
    os.environ[light.VARIABLE] = "1"
    from batchrun.driver import dispatch, partitions, run
    from batchrun.output import manifest

    seen: dict[str, Any] = {}
    if os.environ.get(ALONE):
        dispatch.TASK_SECONDS = partitions.TASK_SECONDS = 0.0
    for name in CALLS:
        setattr(dispatch.Dispatch, name, clock.timed(name, getattr(dispatch.Dispatch, name)))
    dispatch.register_plugin = clock.timed("register", dispatch.register_plugin)
    manifest.write = clock.timed("manifest", manifest.write)
    poll, execute, finish = dispatch.Dispatch._poll, dispatch.Dispatch.execute, run.finish

    def poll_and_tell(self: Any, client: Any) -> dict[str, Any]:
        workers: dict[str, Any] = poll(self, client)
        # Of a moment with as much in hand as ever.
        telling = all("batchrun" in worker["metrics"] for worker in workers.values())
        if telling and len(self.in_flight) >= len(seen.get("members", ())):
            seen.update(workers=workers, members=dict(self.in_flight))
        clock.tell(parts=len(self.partitions.receipts), todo=len(self.partitions.todo), workers=len(workers))
        return workers

    def execute_and_look(self: Any, client: Any) -> None:
        execute(self, client)
        some = next(iter(self.partitions.receipts))
        clock.tell(
            many=[look_at_many(self, seen["workers"], seen["members"], count) for count in MANY],
            task_bytes=len(pickle.dumps((self.order, [self._task(some)]))),
            receipt_bytes=len(pickle.dumps(self.partitions.receipts[some])),
        )

    def finish_and_tell(*args: Any) -> Any:
        done = finish(*args)
        clock.tell(done=True)
        return done

    dispatch.Dispatch._poll = poll_and_tell
    dispatch.Dispatch.execute = execute_and_look
    run.finish = finish_and_tell


def look_at_many(run: Any, workers: dict[str, Any], in_flight: dict[Any, Any], count: int) -> dict[str, Any]:
    """One look at `count` workers, each a copy of a real one at work: seconds of CPU for what the driver does with it
    (counters, progress, record, limits), and for the message, in bytes, from the scheduler to here."""
    from distributed.protocol import dumps, loads

    from batchrun.driver.totals import RunTotals

    run = copy.copy(run)
    run.window = copy.copy(run.window)
    run.in_flight = run.window.tasks = in_flight
    run.totals = RunTotals()
    shown, read, written, size = [], [], [], 0
    for look in range(1, LOOKS + 1):
        many = {
            f"{address}-{number}": grown(worker, look)
            for number, (address, worker) in zip(range(count), list(workers.items()) * count, strict=False)
        }
        began = time.thread_time()
        frames = dumps({"workers": many})
        written.append(time.thread_time() - began)
        size = sum(len(frame) for frame in frames)
        began = time.thread_time()
        told = loads(frames)["workers"]
        read.append(time.thread_time() - began)
        began = time.thread_time()
        now, beats = run._show(told)
        run.guard(now)
        for address, attempt, activity in beats.activity:
            run._end_if_stalled(None, address, attempt, activity)
        run.stalls.forget(run.window.partitions)
        shown.append(time.thread_time() - began)
    median = statistics.median
    return {
        "workers": count, "bytes": size, "dumps": median(written), "loads": median(read), "show": median(shown)
    }  # fmt: skip


def grown(worker: dict[str, Any], look: int) -> dict[str, Any]:
    """The worker a little later: its counters have grown, so that nobody takes it for one that hangs."""
    worker = copy.deepcopy(worker)
    said = worker["metrics"]["batchrun"]
    for counters in (*said["tasks"], *said["engines"]):
        for name, value in counters.items():
            if isinstance(value, int) and name not in ("pid", "partition", "failed", "empty"):
                counters[name] = value + look
    return worker


if __name__ == "__main__":
    clock = Clock(Path(sys.argv[1]))
    sys.argv = ["batchrun", *sys.argv[2:]]
    from batchrun import __main__ as program

    install(clock)
    program.main()
