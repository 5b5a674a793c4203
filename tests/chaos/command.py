"""One command as its user starts it, in a terminal or without one, and the tree of processes below it."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from .processes import send

MARK = "BATCHRUN_TEST_COMMAND"
KINDS = {
    "batchrun.engine.server": "engine",
    "batchrun.engine.rank": "rank",
    "batchrun.prompt.render_server": "renderer",
    "spawn_main": "worker",
    "resource_tracker": "tracker",
    "-m batchrun ": "driver",
}


class Command:
    """`python -m batchrun WORDS`. What it prints is in `log`, and every process below it carries its mark."""

    _count = 0

    def __init__(self, words: list[str], log: Path, terminal: bool, env: dict[str, str]) -> None:
        Command._count += 1
        self.mark = f"{os.getpid()}-{Command._count}"
        self.log, self.terminal = log, terminal
        self.before = set(pids())
        self._closed = False
        whole = [sys.executable, "-m", "batchrun", *words]
        environ = {**env, MARK: self.mark, "TERM": "xterm-256color" if terminal else "dumb"}
        self.started = time.monotonic()
        if terminal:
            self._master, slave = pty.openpty()
            self.process = subprocess.Popen(whole, env=environ, preexec_fn=lambda: os.login_tty(slave))
            os.close(slave)
            threading.Thread(target=self._record, daemon=True).start()
        else:
            with open(log, "wb") as file:
                self.process = subprocess.Popen(
                    whole, env=environ, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )  # fmt: skip

    @property
    def ended(self) -> int | None:
        return self.process.poll()

    @property
    def text(self) -> str:
        return self.log.read_text(errors="replace")

    @property
    def last_line(self) -> str:
        lines = [line for line in self.text.replace("\r", "\n").splitlines() if line.strip()]
        return lines[-1][:400] if lines else ""

    def tree(self) -> dict[int, str]:
        """The living processes of this command: pid and what it is."""
        found = {}
        for pid in pids():
            if pid not in self.before and f"{MARK}={self.mark}\0" in read(pid, "environ") and alive(pid):
                words = read(pid, "cmdline").replace("\0", " ")
                found[pid] = next((kind for part, kind in KINDS.items() if part in words), f"other: {words}")
        return found

    @property
    def hooked(self) -> bool:
        """Whether anything but the interpreter's own start has happened: it reacts to SIGTERM."""
        caught = [line for line in read(self.process.pid, "status").splitlines() if line.startswith("SigCgt")]
        return bool(caught) and bool(int(caught[0].split()[1], 16) >> (signal.SIGTERM - 1) & 1)

    def hang_up(self) -> None:
        """Closes the terminal's window, or tells the process group as the end of a session does."""
        if self.terminal:
            self._closed = True
        else:
            os.killpg(self.process.pid, signal.SIGHUP)

    def interrupt(self) -> None:
        """Ctrl-C, which a terminal sends to all processes in its foreground."""
        if self.terminal:
            # Its recorder closes a terminal whose last process has left.
            with contextlib.suppress(OSError):
                os.write(self._master, b"\x03")
        else:
            os.killpg(self.process.pid, signal.SIGINT)

    def clear(self) -> None:
        """Ends whatever is left."""
        while left := self.tree():
            for pid in left:
                send(pid, signal.SIGKILL)
            time.sleep(0.05)
        self.process.wait()

    def _record(self) -> None:
        """What the terminal shows, until its window is closed."""
        with open(self.log, "wb", buffering=0) as file:
            while not self._closed:
                if select.select([self._master], [], [], 0.02)[0]:
                    try:
                        file.write(os.read(self._master, 1 << 16))
                    except OSError:
                        break
        os.close(self._master)


def pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def read(pid: int, name: str) -> str:
    """A file of /proc; empty for a process that is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes().decode(errors="replace")
    except OSError:
        return ""


def alive(pid: int) -> bool:
    """A zombie is not."""
    return read(pid, "stat").rpartition(") ")[2][:1] not in ("", "Z", "X")
