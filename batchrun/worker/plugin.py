"""A worker's process besides its tasks: the heartbeat, the driver's calls to all workers, and how it leaves."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
import time
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from distributed import Worker, WorkerPlugin

from batchrun.engine.protocol import EngineSpec
from batchrun.model.light import import_tokenizers
from batchrun.prompt.renderer import RENDERER
from batchrun.telemetry.gpu import gpu_now
from batchrun.worker.handover import Given
from batchrun.worker.state import worker_state

# Seconds that a worker told to leave waits for its tasks to stage what they hold; 3 as a rule.
FLUSH_ON_EXIT = 8.0
# Seconds that an attempt has to say which rows it gives up; it may be at the store, or make prompts.
HANDOVER_SECONDS = 2.0


class BatchrunPlugin(WorkerPlugin):
    """Registered once per run: hooks the heartbeat, and lets a leaving worker stage what it holds."""

    name = "batchrun"
    idempotent = True

    def __init__(self) -> None:
        # The loop itself holds no task.
        self._leaving: set[asyncio.Task[None]] = set()

    def setup(self, worker: Worker) -> None:
        """Dask's call on every worker, now and later."""
        worker.metrics["batchrun"] = snapshot
        if threading.current_thread() is threading.main_thread():
            # Ctrl-C and a closed terminal reach the whole process group; the driver decides what that means here.
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            signal.signal(signal.SIGHUP, signal.SIG_IGN)
            if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGTERM, lambda: self._leaving.add(loop.create_task(_leave())))

    async def teardown(self, worker: Worker) -> None:
        """Dask's call before a worker closes."""
        await _stop_work()


def snapshot(dask_worker: Worker) -> dict[str, Any]:
    """The worker's part of the heartbeat: plain values of all running tasks, of the engine and of its GPUs.

    `loading` grows, in CPU seconds, while something loads that has no counters yet, `rendered` while templates are.
    """
    gpu = gpu_now(max((engine.spec.gpus for engine in worker_state.engines), default=1))
    return {
        "tasks": [asdict(counters) for counters in worker_state.attempts],
        "engines": [asdict(engine.stats()) for engine in worker_state.engines],
        "loading": worker_state.loading_seconds,
        "rendered": RENDERER.answers,
        "gpu": asdict(gpu) if gpu else None,
    }


async def start_engine(spec: EngineSpec) -> None:
    """Run on the workers of this machine at a run's start: the engine loads before the first task comes."""

    def start() -> None:
        worker_state.start_engine(spec)
        # The first task would wait for it. It imports again what could not be imported, and says why.
        with suppress(Exception):
            import_tokenizers()

    # Not on the event loop, which must never wait for a task that holds the lock.
    threading.Thread(target=start, name="batchrun-start", daemon=True).start()


async def hand_over(task: str, share: float, is_longest_first: bool) -> Given:
    """Run on the task's worker: the rows that its attempt leaves to another worker from now on, about this share of the
    work that it has left, the longest ones or the shortest."""
    handover = worker_state.handover(task)
    if handover is None:
        return [], 0.0
    answer = asyncio.wrap_future(handover.ask(share, is_longest_first))
    try:
        return await asyncio.wait_for(answer, HANDOVER_SECONDS)
    except TimeoutError:
        return [], 0.0


async def request_stop(run: str) -> None:
    """Run on every worker when the driver was interrupted: tasks of this run flush and return."""
    worker_state.stop_run(run)


async def end_at_once() -> None:
    """Run on a worker that hangs: its nanny, or whoever started it, starts another one."""
    os.kill(os.getpid(), signal.SIGKILL)


async def _stop_work() -> None:
    """Tasks stage what they hold and return; then the engines end."""
    worker_state.leave()
    deadline = time.monotonic() + FLUSH_ON_EXIT
    while any(one.may_hold_answers for one in worker_state.attempts) and time.monotonic() < deadline:
        await asyncio.sleep(0.05)
    # Not on the event loop: the driver reads receipts meanwhile.
    await asyncio.to_thread(worker_state.stop_engines)


async def _leave() -> None:
    """On SIGTERM, which a nanny's worker would die of at once. Whether another one takes its place is the nanny's
    decision; a worker that closes by itself it would take for one that is not wanted any more."""
    await _stop_work()
    os._exit(128 + signal.SIGTERM)
