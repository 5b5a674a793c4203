"""What rank 0 and another rank of an engine tell each other; pickled, since they are one program."""

from __future__ import annotations

from dataclasses import dataclass

from batchrun.engine.protocol import EngineSpec

PULSE_SECONDS = 2
SILENT_SECONDS = 40
"""Both send a sign of life every PULSE_SECONDS, by a thread of their own. One that has stopped, or whose machine has,
is given up before a minute has passed; importing and compiling let threads run far more often than that."""
STUCK_SECONDS = 45
"""All ranks live, and none gets on with loading, or with a batch: see `HostProgress`. The smallest steps, a page of a
file, a layer on a device, a pass of a compiler, take far less."""


@dataclass(frozen=True, slots=True)
class Member:
    """To a rank, first of all: what it is part of. The model's `config` is there if its weights are random; pickled,
    since what it needs is not imported where this is received."""

    spec: EngineSpec
    page_size: int
    rank: int
    store: str
    config: bytes | None = None


@dataclass(frozen=True, slots=True)
class Pulse:
    """A sign of life, either way, and how far a rank has come: see `HostProgress.look`."""

    progress: int = 0


@dataclass(frozen=True, slots=True)
class Done:
    """From a rank: a batch has been launched on its device."""


@dataclass(frozen=True, slots=True)
class Failure:
    """From a rank, as its last word."""

    reason: str
    out_of_memory: bool
