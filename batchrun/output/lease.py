"""One driver at a time, as a courtesy: two would pay for the same rows twice, but never write them twice."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
import uuid
from contextvars import copy_context
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Self

from batchrun.errors import BatchrunError, LeaseHeld
from batchrun.output import document
from batchrun.output.document import Damaged
from batchrun.output.layout import LEASE, TEMPORARY
from batchrun.storage import Folder, NotFound

log = logging.getLogger(__name__)

HEARTBEAT = 10.0
EXPIRY = 60.0
# After taking a lease over, so long is waited for another driver that did the same at the same time.
SETTLE = 1.0


@dataclass(frozen=True, slots=True)
class Holder:
    """A driver: where it runs, so that a driver on the same machine can tell whether it still does.

    `machine` is the boot and the process namespace that `pid` belongs to, `started` the process's start time
    since that boot: a pid alone comes again, and containers share host names. Both are empty without /proc.
    """

    driver: str
    host: str
    pid: int
    machine: str
    started: str
    since: float
    heartbeat: float

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_dead(self) -> bool:
        """Whether its process is known to be gone; False where that cannot be known."""
        return bool(self.machine) and self.machine == _machine() and _started(self.pid) != self.started


@dataclass(slots=True)
class Lease:
    """A context: taken on entry, kept alive by a thread, given back on exit if still held.

    `force` takes it over from a live driver, which `check` then stops.

    Raises:
        LeaseHeld: on entry, another driver is alive.
    """

    folder: Folder
    force: bool = False
    taken_by: Holder | None = None
    _holder: Holder = field(default_factory=lambda: _this_process())
    _stop: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> Self:
        self._acquire()
        # In this context, which knows who tells the run to stop.
        beat = partial(copy_context().run, self._beat)
        self._thread = threading.Thread(target=beat, name="batchrun-lease", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=HEARTBEAT)
        try:
            if self._is_ours():
                self.folder.delete([LEASE])
        except BatchrunError as problem:
            # It expires by itself, and must not hide why the run ended.
            log.warning("the lease could not be given back: %s", problem)

    def check(self) -> None:
        """Raises LeaseHeld once another driver has taken the lease over, at most a heartbeat ago."""
        if self.taken_by is not None:
            what = f"{self.taken_by} took it over; stopped, all staged"
            raise LeaseHeld(what, self.folder.name, "wait for it")

    def _acquire(self) -> None:
        if self.folder.put_if_absent(LEASE, self._document()) or self._is_ours():
            return
        holder = read(self.folder)
        if holder is not None and not self.force and not holder.is_dead() and self._age(holder) < EXPIRY:
            raise _held(holder, self.folder)
        self.folder.put(LEASE, self._document())
        time.sleep(SETTLE)
        if not self._is_ours():
            raise _held(read(self.folder), self.folder)

    def _beat(self) -> None:
        while not self._stop.wait(HEARTBEAT):
            try:
                holder = read(self.folder)
                # One that took it over and has left again leaves none.
                if holder is not None and holder.driver != self._holder.driver:
                    self.taken_by = holder
                    return
                self._holder = replace(self._holder, heartbeat=time.time())
                self.folder.put(LEASE, self._document())
            except BatchrunError as error:
                log.warning("the lease could not be renewed: %s", error)

    def _is_ours(self) -> bool:
        holder = read(self.folder)
        return holder is not None and holder.driver == self._holder.driver

    def _document(self) -> bytes:
        return document.encode(asdict(self._holder))

    def _age(self, holder: Holder) -> float:
        """Seconds since the last heartbeat, by the store's clock, or by the drivers' where it shows none."""
        key = f"{TEMPORARY}clock-{self._holder.driver}"
        beaten = self.folder.modified(LEASE)
        if beaten is None:
            return time.time() - holder.heartbeat
        self.folder.put(key, b"")
        now = self.folder.modified(key)
        self.folder.delete([key])
        return time.time() - holder.heartbeat if now is None else now - beaten


def read(folder: Folder) -> Holder | None:
    """Who holds the output; None where nobody does, or where the lease is damaged and so nobody's."""
    try:
        return Holder(**document.decode(folder.read(LEASE)))
    except NotFound:
        return None
    except (Damaged, TypeError) as error:
        log.warning("the lease on %s is damaged (%s) and counts as nobody's", folder.name, error)
        return None


def _held(holder: Holder | None, folder: Folder) -> LeaseHeld:
    if holder is None:
        return LeaseHeld("another run has just taken it", folder.name, "run again")
    since = datetime.fromtimestamp(holder.since, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
    what = f"{holder} has been writing to it since {since}"
    return LeaseHeld(what, folder.name, "wait for it, or --force if it is gone")


def _this_process() -> Holder:
    now = time.time()
    pid = os.getpid()
    return Holder(uuid.uuid4().hex, socket.gethostname(), pid, _machine(), _started(pid), now, now)


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    try:
        # The name in parentheses may hold anything; the start time is the 20th field after it.
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except OSError:
        return ""
