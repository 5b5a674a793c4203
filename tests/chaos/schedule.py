"""Which faults come when: drawn from a seed alone, so that the same seed gives the same schedule again."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

# What becomes of a request to the store, and how often: the rest is let through.
REQUEST_FAULTS = {
    "burst": 0.03,  # 503 SlowDown, to the next few requests as well
    "reset": 0.06,  # the connection breaks before the store sees the request
    "lost": 0.08,  # ... after it did what was asked: the acknowledgement is lost
    "truncated": 0.06,  # half of the answer's body, then the connection breaks
    "slow": 0.04,
    "stale": 0.04,  # a listing as it was the last time
}
LONGEST_BURST = 12
SLOWEST = 2.0  # seconds

# What happens to processes, by weight.
EVENTS = {
    "worker-kill": 3,
    "worker-term": 2,
    "worker-pause": 2,  # until its partitions were given away, then it goes on: a zombie
    "engine-kill": 4,
    "driver-kill": 2,
    "driver-term": 1,
    "second-driver": 1,
    "scheduler-kill": 1,
}
GAP = (4.0, 10.0)  # seconds between two events, while there is an engine to work on rows


@dataclass(frozen=True)
class Event:
    """`at` on the round's own clock; `choice`, in [0, 1), says which of the processes there are then."""

    at: float
    kind: str
    choice: float


@dataclass(frozen=True)
class Verdict:
    fault: str | None
    amount: float  # in [0, 1): how long, or how many


def events(seed: str, only: Collection[str]) -> Iterator[Event]:
    """The process events of one round, without end."""
    rng = random.Random(f"events {seed}")
    at = 0.0
    while True:
        at += rng.uniform(*GAP)
        kind = rng.choices(list(EVENTS), list(EVENTS.values()))[0]
        choice = rng.random()
        if kind in only:
            yield Event(at, kind, choice)


def verdict(seed: str, number: int, only: Collection[str]) -> Verdict:
    """What becomes of the round's request with this number."""
    rng = random.Random(f"request {seed} {number}")
    left, amount = rng.random(), rng.random()
    for fault, share in REQUEST_FAULTS.items():
        left -= share
        if left < 0:
            return Verdict(fault if fault in only else None, amount)
    return Verdict(None, amount)
