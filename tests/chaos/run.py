"""One run of the command, followed from its start to its end, and what strikes it on the way."""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from contextlib import suppress
from pathlib import Path

from .case import Case
from .check import Violation
from .command import Command
from .processes import send
from .rows import ROOM
from .strikes import Strike
from .totals import Totals

GONE = 5.0  # seconds in which whatever a command started is gone, too
CALM = 180.0  # ... in which a command ends that nothing happens to
LOADS = 3  # losses in a row that end a run
NOTICED = 60.0  # ... more for each process that is paused
HANGS = 60.0  # ... after a stop signal, when nothing is waited for any more


class Run:
    """One command, followed from its start to its end."""

    def __init__(
        self, case: Case, command: Command, engines: Path, strikes: deque[Strike], totals: Totals
    ) -> None:
        self.case, self.command, self.engines, self.strikes, self.totals = (
            case,
            command,
            engines,
            strikes,
            totals,
        )
        self.kills: list[str] = []
        self.paused: list[int] = []
        self.stopped: list[str] = []
        self.fatal = False
        self.unhooked = False
        self.first_stop = 0.0
        self.last_strike = 0.0
        self.allowed = 0
        self.costly: list[float] = []
        self.parts_before = len(self._parts())
        self.was_complete = self._manifest()
        self.began: dict[str, float] = {"import": command.started}

    def follow(self) -> None:
        """Until the command has ended."""
        looked = 0.0
        while self.command.ended is None:
            now = time.monotonic()
            if now - looked > 0.05:
                looked = now
                self.notice_slow()
            self.notice()
            self.strike_if_due()
            if self.stopped and not self.unhooked and now - self.first_stop > HANGS:
                raise Violation(f"it runs {HANGS} s after {self.stopped}: {self.command.last_line}")
            if now - self.command.started > CALM * self.case.ranks + NOTICED * len(self.paused):
                raise Violation(f"it hangs after {self.kills}: {self.command.last_line}")
            time.sleep(0.002)
        ended = time.monotonic()
        if self.stopped:
            self.took = ended - self.first_stop
        if self.stopped and not self.unhooked:
            self.totals.stops.append(round(self.took, 2))
        while left := self.command.tree():
            if time.monotonic() - ended > GONE:
                raise Violation(f"{left} are left after {self.what}")
            time.sleep(0.02)
        self.totals.slowest_exit = max(self.totals.slowest_exit, time.monotonic() - ended)

    @property
    def phase(self) -> str:
        """The last one that has begun."""
        return list(self.began)[-1]

    def notice_slow(self) -> None:
        if "loading" not in self.began:
            kinds = self.command.tree().values()
            if "preparation" not in self.began and set(kinds) - {"driver"}:
                self.begin("preparation")
            if "engine" in kinds:
                self.begin("loading")
        elif "generation" not in self.began and any(f.stat().st_size for f in self.engines.iterdir()):
            self.begin("generation")

    def notice(self) -> None:
        if len(self._parts()) > len(self.case.seen):
            self.case.look()
        if (
            self.case.tail
            and "tail" not in self.began
            and "generation" in self.began
            and self.case.is_in_tail
        ):
            self.begin("tail")
        if "sealing" not in self.began and len(self.case.seen) > self.parts_before:
            self.begin("sealing")
        if "end" not in self.began and not self.was_complete and self._manifest():
            self.begin("end")
        elif "manifest" not in self.began and "sealing" in self.began and self._whole():
            self.begin("manifest")

    def begin(self, phase: str) -> None:
        self.began[phase] = time.monotonic()

    def strike_if_due(self) -> None:
        if not self.strikes or self.fatal or self.stopped:
            return
        strike = self.strikes[0]
        since = self.began.get(strike.phase)
        if since is None or time.monotonic() < max(since, self.last_strike) + strike.delay:
            return
        if self.strike(strike):
            self.strikes.popleft()

    def strike(self, strike: Strike) -> bool:
        """Whether there was something to strike."""
        tree = self.command.tree()
        totals, phase = self.totals, self.phase
        if strike.is_signal:
            if self.command.ended is not None:
                return False
            self.unhooked = not self.command.hooked
            self.first_stop = time.monotonic()
            self.stopped.append(f"{strike.what} in {phase}")
            self.send(strike, tree)
            if self.unhooked:
                totals.before_hooks += 1
            else:
                totals.signals[f"{strike.what} in {phase}"] += 1
        else:
            what = strike.what.removeprefix("pause of ")
            targets = [pid for pid, kind in tree.items() if what in (kind, "tree") and pid not in self.paused]
            if not targets or self.command.ended is not None:
                return False
            if strike.what == "tree":
                for pid in targets:
                    send(pid, signal.SIGKILL)
            else:
                target = targets[int(strike.choice * len(targets))]
                if not send(target, signal.SIGKILL if what == strike.what else signal.SIGSTOP):
                    return False
                self.paused += [target] if what != strike.what else []
            self.fatal = strike.what in ("driver", "tree")
            self.kills.append(f"{strike.what} in {phase}")
            totals.kills[f"{strike.what} in {phase}"] += 1
        if cost := self.cost(strike):
            self.allowed += cost
            self.costly.append(time.time())
        self.last_strike = time.monotonic()
        return True

    def send(self, strike: Strike, tree: dict[int, str]) -> None:
        match strike.what:
            case "SIGINT":
                self.command.interrupt()
            case "SIGHUP":
                self.command.hang_up()
            case "SIGTERM":
                send(self.command.process.pid, signal.SIGTERM)
            case "SIGTERM to all":
                for pid in tree:
                    send(pid, signal.SIGTERM)
            case "SIGINT twice":
                self.command.interrupt()
                # Sooner, it is taken for one.
                time.sleep(0.6 + strike.choice)
                # It may have ended since, and its terminal with it.
                with suppress(OSError):
                    self.command.interrupt()

    def cost(self, strike: Strike) -> int:
        """Rows that this may have generated again: those at work and those not staged, on the workers that it hits."""
        case = self.case
        worker = ROOM + case.slots * min(2 * case.flush_rows, case.rows_per_part)
        costs = {
            "driver": case.workers * worker, "tree": case.workers * worker, "SIGINT twice": case.workers * worker,
            "worker": worker, "engine": worker, "rank": worker, "pause of rank": worker, "pause of engine": worker,
        }  # fmt: skip
        return costs.get(strike.what, 0)

    def judge(self, stop_seconds: float) -> bool:
        """Whether the output is complete.

        Raises:
            Violation: the exit code, the words or the time to a stop are not as documented.
        """
        self.case.look()
        code, complete = self.command.ended, self._manifest()
        done = 3 if self.case.expected_codes else 0
        if self.unhooked:
            # Python itself was still starting: it dies of the signal in its own way, or loses it.
            codes = {4, done, -signal.SIGINT, -signal.SIGTERM, -signal.SIGHUP, 1, 130}
        elif self.stopped:
            codes = {done if complete else 4}
        elif self.fatal:
            codes = {-signal.SIGKILL, *({done} if complete else {})}
        else:
            codes = {done}
        lost = sum(kill.startswith(("engine", "worker", "rank", "pause")) for kill in self.kills)
        if lost >= LOADS and not self.stopped:
            # So many in a row are taken for an engine that cannot be loaded.
            codes.add(1)
        if code not in codes:
            raise Violation(f"exit code {code} after {self.what}: {self.command.last_line}")
        if (found := self.tracebacks()) and not self.unhooked:
            raise Violation(f"a traceback after {self.what}: {found[0][:3000]}")
        if self.stopped and not self.unhooked and self.took > stop_seconds:
            raise Violation(f"it took {self.took:.1f} s to end after {self.what}")
        kind = "signal" if self.stopped else "killed" if self.fatal else "end"
        self.totals.ends[f"{code} {kind}{' complete' if complete else ''}"] += 1
        return complete and code == done

    def tracebacks(self) -> list[str]:
        """Those that were printed, but for those of Python's own processes whose counterpart was killed."""
        blocks = self.command.text.split("Traceback (most recent call last)")[1:]
        if self.fatal:
            return [block for block in blocks if "/batchrun/" in block]
        # A resource tracker that was started again knows nothing of what the killed one knew.
        return [block for block in blocks if 'multiprocessing/resource_tracker.py", line' not in block]

    @property
    def what(self) -> list[str]:
        """What it was struck by."""
        return [*self.kills, *self.stopped] or ["nothing"]

    def __str__(self) -> str:
        took = f", {self.took:.1f} s, load {os.getloadavg()[0]:.1f}" if self.stopped else ""
        return f"{', '.join(self.what)} -> {self.command.ended}{took}: {self.command.last_line[-150:]}"

    def _parts(self) -> list[Path]:
        return list((self.case.out / "data").rglob("*.parquet"))

    def _manifest(self) -> bool:
        return (self.case.out / "_job/manifest.json").exists()

    def _whole(self) -> bool:
        """Whether every row is in a part."""
        return self.case.rows_seen == len(self.case.wanted)
