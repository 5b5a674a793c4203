"""Which process is killed, or which signal is sent, in which moment of a run: drawn from a seed alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

KILLS = {"driver": 3, "worker": 6, "engine": 8, "renderer": 6, "tracker": 2, "tree": 3}
"""What SIGKILL hits, by weight. The tree is every process of the run at once, as a machine that vanishes."""
KILLS_OF_RANKS = {**KILLS, "renderer": 2, "rank": 8, "pause of rank": 2, "pause of engine": 2}
"""Where an engine is a group of processes, any of which may also be paused (SIGSTOP) for good."""
KILLS_IN_TAIL = {"driver": 2, "worker": 8, "engine": 8, "tree": 2}
SIGNALS = {"SIGINT": 3, "SIGTERM": 3, "SIGHUP": 2, "SIGINT twice": 3, "SIGTERM to all": 2}
"""To all is what systemd and a cluster's scheduler do."""

# A phase begins with something that is seen from outside; the strike comes up to so many seconds later.
PHASES = {
    "import": 1.3,  # the command was started
    "preparation": 1.6,  # its first process below: plan, model check, cluster start
    "loading": 1.6,  # the first engine's process
    "generation": 1.5,  # a request reached an engine
    "sealing": 1.0,  # a part came
    "tail": 1.5,  # the last partitions are in workers' hands (only a case with a tail has this)
    "manifest": 0.05,  # the last part is there
    "end": 0.7,  # the manifest is there: record, report, what is printed
}
EARLY = ["import", "preparation", "loading", "generation", "generation", "sealing"]
MOST = 12
LATE = ["sealing", "manifest", "end"]


@dataclass(frozen=True)
class Strike:
    """`delay` seconds after `phase` begins; `choice`, in [0, 1), says which of the processes there are then."""

    what: str
    phase: str
    delay: float
    choice: float

    @property
    def is_signal(self) -> bool:
        return self.what in SIGNALS


def strikes(
    seed: str, most: int = MOST, signals: float = 0.15, only: str | None = None, kills: dict[str, int] = KILLS
) -> Iterator[Strike]:
    """The strikes at one output, one after the other; the last one comes late in its run. `only` is the one phase of
    all, `kills` are those of other phases than the tail."""
    rng = random.Random(f"strikes {seed}")
    count = rng.randint(most // 2, most)
    for number in range(count):
        last = number == count - 1
        phase = only or rng.choice(LATE if last else EARLY)
        killed = KILLS_IN_TAIL if only == "tail" else kills
        weights = SIGNALS if rng.random() < (0.5 if last else signals) else killed
        what = rng.choices(list(weights), list(weights.values()))[0]
        yield Strike(what, phase, rng.random() * PHASES[phase], rng.random())
