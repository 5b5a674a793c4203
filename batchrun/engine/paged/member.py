"""A rank other than the first: loads its share, then runs what rank 0 does."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from dataclasses import replace
from multiprocessing.connection import Connection
from queue import SimpleQueue
from typing import Any

import torch

from batchrun.engine.out_of_memory import is_out_of_memory
from batchrun.engine.paged.device_side import allocate_pages, budget_of, make_runner
from batchrun.engine.paged.parallel.group import Group, device_of
from batchrun.engine.paged.parallel.messages import (
    PULSE_SECONDS,
    SILENT_SECONDS,
    Done,
    Failure,
    Member,
    Pulse,
)
from batchrun.engine.paged.parallel.progress import Progress
from batchrun.engine.paged.parallel.share import load_share
from batchrun.engine.paged.runner import Runner
from batchrun.engine.paged.work import Work
from batchrun.errors import one_line


def serve(connection: Connection, parent: int) -> None:
    """Runs until rank 0 is gone, which it ends if it says nothing for too long."""
    member: Member = connection.recv()
    inbox: SimpleQueue[Work] = SimpleQueue()
    group = Group(member.rank, member.spec.gpus, member.store, device_of(member.spec, member.rank))
    link = _Link(connection, parent, inbox, group.progress)
    try:
        runner = _load(member, group)
        while True:
            runner.run(inbox.get())
            link.send(Done())
    except BaseException as error:
        traceback.print_exc()
        link.send(Failure(one_line(error), is_out_of_memory(error)))
        # Rank 0 may be about to fail of the same, in its own words, and ends this process when it does.
        threading.Event().wait()


def _load(member: Member, group: Group) -> Runner:
    if group.device.type == "cuda":
        torch.cuda.set_device(group.device)
    spec = replace(member.spec, device=str(group.device))
    model = load_share(spec, group, member.config)
    budget = budget_of(spec, model, group)
    runner = make_runner(spec, model, budget, member.page_size, group)
    allocate_pages(spec, runner, budget, group)
    return runner


class _Link:
    """To rank 0: a thread that receives, so that rank 0 need not wait for this one, and one that shows it is alive."""

    def __init__(
        self, connection: Connection, parent: int, inbox: SimpleQueue[Work], progress: Progress
    ) -> None:
        self._connection, self._parent, self._inbox = connection, parent, inbox
        self._progress = progress
        self._sending = threading.Lock()
        self._silent = 0
        threading.Thread(target=self._receive, daemon=True).start()
        threading.Thread(target=self._pulse, daemon=True).start()

    def send(self, message: Any) -> None:
        """One caller at a time; the process ends where nobody listens."""
        try:
            with self._sending:
                self._connection.send(message)
        except OSError:
            os._exit(0)

    def _receive(self) -> None:
        try:
            while True:
                message = self._connection.recv()
                self._silent = 0
                if not isinstance(message, Pulse):
                    self._inbox.put(message)
        except (EOFError, OSError):
            os._exit(0)

    def _pulse(self) -> None:
        # Counted, not measured: while this process itself is paused, rank 0's silence is not.
        while self._silent <= SILENT_SECONDS:
            self.send(Pulse(self._progress.look()))
            time.sleep(PULSE_SECONDS)
            self._silent += PULSE_SECONDS
        # It has stopped, so that nobody else would end it.
        print(f"RankError: rank 0 has said nothing for {SILENT_SECONDS} s", file=sys.stderr, flush=True)
        with suppress(ProcessLookupError):
            os.kill(self._parent, signal.SIGKILL)
        os._exit(1)
