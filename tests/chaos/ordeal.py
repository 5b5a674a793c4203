"""One output's ordeal: a command that is struck again and again until it is complete, and what holds meanwhile."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from batchrun.telemetry.printable import printable
from tests.support.jobs import environment

from .case import Case
from .check import Violation
from .command import Command
from .run import CALM, Run
from .strikes import Strike
from .totals import Totals

RUNS = 40
UNSTAGED = 3.0  # seconds that staging may take once it is due
PUT = 2.0  # seconds that a put takes where the machine is busy


@dataclass
class Log:
    """What a run's engines noted: rows taken with their begun tokens, rows given back with all their tokens."""

    taken: list[tuple[int, int]] = field(default_factory=list)
    given: dict[int, tuple[float, int, bool]] = field(default_factory=dict)
    finished: list[float] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path) -> Log:
        log = cls()
        for file in folder.iterdir():
            for line in file.read_text().splitlines():
                match line.split():
                    case [_, "take", row, "wrong"]:
                        raise Violation(f"row {row} came back with tokens that are not its own")
                    case [_, "take", row, begun]:
                        log.taken.append((int(row), int(begun)))
                    case [at, "give", row, tokens, reason]:
                        log.given[int(row)] = float(at), int(tokens), reason == "length"
                        log.finished.append(float(at))
        return log


class Ordeal:
    """`execute` once. Every process it started is gone afterwards."""

    def __init__(self, case: Case, strikes: Iterable[Strike], totals: Totals, stop_seconds: float) -> None:
        self.case, self.totals, self.stop_seconds = case, totals, stop_seconds
        self.strikes = deque(strikes)
        self.rng = random.Random(f"ordeal {case.seed}")
        self.begun: dict[int, int] = {}
        self.runs = 0

    def execute(self) -> None:
        """Raises Violation."""
        while not self.run():
            if self.rng.random() < 0.4:
                self.ask()
            if self.runs > RUNS:
                raise Violation(f"{RUNS} runs did not complete it")
        self.case.finish()
        self.check_end()
        self.totals.outputs += 1
        self.totals.rows += len(self.case.wanted)

    def run(self) -> bool:
        """One run with the strikes that fall into it; whether the output is complete."""
        self.runs += 1
        durable = self.case.durable()
        folder = self.case.folder / f"engines-{self.runs}"
        folder.mkdir()
        env = environment(BATCHRUN_TEST_LOG=str(folder), BATCHRUN_TEST_DELAY=str(self.case.delay))
        log, terminal = self.case.folder / f"run-{self.runs}.log", self.rng.random() < 0.3
        command = Command(["run", str(self.case.job)], log, terminal, env)
        run = Run(self.case, command, folder, self.strikes, self.totals)
        try:
            run.follow()
            self.totals.runs += 1
            print(f"  run {self.runs}: {printable(str(run))}", flush=True)
            complete = run.judge(self.stop_seconds)
            self.account(run, Log.read(folder), durable)
        finally:
            command.clear()
        return complete

    def account(self, run: Run, log: Log, durable: set[int]) -> None:
        """That nothing staged is generated again, and no more is lost than the strikes explain."""
        rows = [row for row, _ in log.taken]
        self.totals.requests += len(rows)
        if again := durable.intersection(rows):
            raise Violation(f"{len(again)} rows were staged and generated again: {sorted(again)[:5]}")
        if self.case.each > 1:
            # What is lost is told by rows here, and samples of one are given back one by one.
            return
        after = self.case.durable()
        failing = self.case.codes
        twice = len(rows) - len(set(rows) - failing.keys()) - sum(row in failing for row in rows)
        lost = {row for row in rows if row not in after and row not in failing}
        kept = {row for row in lost if row in log.given and not log.given[row][2]}
        # Rows pile up while the store keeps a put waiting, as a busy disk does.
        bound = run.allowed + sum(0 <= moment - at < PUT for moment in run.costly for at in log.finished)
        cost = twice + len(lost - kept)
        self.totals.twice += cost
        self.totals.allowed += bound
        if cost > bound and not self.case.deadly:
            raise Violation(
                f"{twice} requests twice and {len(lost - kept)} lost, where {bound} are explained"
            )
        for row in lost & log.given.keys():
            at, _, answered = log.given[row]
            # With the first of the strikes after it that may have cost it.
            age = next((moment - at for moment in run.costly if moment >= at), 0.0)
            if answered and age > self.case.flush_seconds + UNSTAGED and not self.case.deadly:
                raise Violation(f"row {row} was finished {age:.1f} s before it was lost")
        for row, begun in log.taken:
            if row in self.begun and begun != self.begun[row] and not twice:
                raise Violation(f"row {row} had {self.begun[row]} tokens, it was begun with {begun}")
            self.totals.continued += begun > 0
        # What a stop leaves is begun with, as long as nothing else was killed then.
        for row in rows:
            self.begun.pop(row, None)
        if run.stopped and not run.kills:
            self.begun.update({row: log.given[row][1] for row in kept})

    def ask(self) -> None:
        """`status` and `verify` of an output that is not complete say so."""
        if not (self.case.out / "_job/job.json").exists():
            return
        status = self.call("status", {0})
        parts = len(list((self.case.out / "data").rglob("*.parquet")))
        if (
            status["committed"] != parts
            or status["complete"] != (self.case.out / "_job/manifest.json").exists()
        ):
            raise Violation(
                f"status says {status['committed']} parts, complete {status['complete']}: {parts}"
            )
        verify = self.call("verify", {0, 3} if status["complete"] else {1})
        if verify["passed"] != status["complete"] or verify["parts"] != parts:
            raise Violation(f"verify says {verify}")
        wrong = [
            line for line in verify["problems"] if "missing" not in str(line) and "manifest" not in str(line)
        ]
        if wrong:
            raise Violation(f"verify says {wrong}")

    def check_end(self) -> None:
        """The complete output: `verify` passes, another run does nothing, `clean` leaves nothing to sweep."""
        case = self.case
        failed = len(case.expected_codes) * case.each
        counts = json.loads((case.out / "_job/manifest.json").read_text())
        if (counts["rows"], counts["failed"]) != (len(case.wanted) * case.each, failed):
            raise Violation(f"the manifest counts {counts['rows']} rows, {counts['failed']} failed")
        self.check_verify(failed)
        if self.rng.random() < 0.3:
            before = contents(case.out)
            self.call("run", {3 if failed else 0})
            if contents(case.out) != before:
                raise Violation("a run after the end wrote something")
        if self.rng.random() < 0.3:
            self.call("clean", {0})
            left = [path for path in (case.out / "_job/stage").rglob("*") if path.is_file()]
            if left:
                raise Violation(f"clean left {left[:3]}")
            self.check_verify(failed)

    def check_verify(self, failed: int) -> None:
        verify = self.call("verify", {3 if failed else 0})
        rows = len(self.case.wanted) * self.case.each
        if (verify["rows"], verify["failed"], verify["problems"]) != (rows, failed, []):
            raise Violation(f"verify says {verify}")

    def call(self, word: str, codes: set[int]) -> dict[str, Any]:
        """A command that nothing happens to."""
        words = [sys.executable, "-m", "batchrun", word, str(self.case.job), "--json"]
        done = subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=CALM)
        if done.returncode not in codes or "Traceback" in done.stderr:
            raise Violation(f"{word} ended with {done.returncode}: {done.stdout[-800:]} {done.stderr[-800:]}")
        return dict(json.loads(done.stdout.splitlines()[-1]))


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    return {
        str(path): (path.stat().st_mtime_ns, path.stat().st_size)
        for path in folder.rglob("*")
        if path.is_file()
    }
