"""What the runs of an output have cost so far: one small document for each, kept up to date while it goes on."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, fields

from batchrun.errors import BatchrunError, OutputError
from batchrun.output import document
from batchrun.output.document import Damaged
from batchrun.output.layout import LEDGER
from batchrun.storage import Folder

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between two writes: what a killed driver leaves uncounted at most


@dataclass(slots=True)
class Run:
    """One run: `worker_seconds` sums up over its workers from the first one on, one of which is one GPU.

    `start_seconds` passed before its first engine was at work, `start_worker_seconds` over all its workers. Rows and
    tokens are those that this run generated.
    """

    run: str
    started: float = field(default_factory=time.time)
    seconds: float = 0.0
    worker_seconds: float = 0.0
    start_seconds: float = 0.0
    start_worker_seconds: float = 0.0
    rows: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    engine: str = ""
    device: str = ""


class Ledger:
    """This run's entry, and what all earlier runs of the output add up to."""

    def __init__(self, folder: Folder, run: str) -> None:
        self.folder, self.run = folder, Run(run)
        self.earlier_worker_seconds = sum(entry.worker_seconds for entry in read(folder))
        self._key = f"{LEDGER}{int(self.run.started)}-{run[:8]}.json"
        self._written = time.monotonic()

    @property
    def worker_seconds(self) -> float:
        """Of all runs of this output."""
        return self.earlier_worker_seconds + self.run.worker_seconds

    def tick(self, seconds: float, workers: int) -> None:
        """Counts the time since the last tick; `seconds` are those since the run started."""
        self.run.worker_seconds += (seconds - self.run.seconds) * workers
        self.run.seconds = seconds
        if time.monotonic() - self._written >= EVERY:
            self.write()

    def write(self) -> None:
        """What cannot be written now is written the next time: no run ends for its own bookkeeping."""
        self._written = time.monotonic()
        try:
            self.folder.put(self._key, document.encode(asdict(self.run)))
        except BatchrunError as error:
            log.warning("the run's ledger could not be written: %s", error)


def read(folder: Folder) -> list[Run]:
    """The runs that wrote something down, oldest first.

    Raises:
        OutputError: a document is damaged.
    """
    known = {f.name for f in fields(Run)}
    runs: list[Run] = []
    for key in sorted(folder.list(LEDGER)):
        try:
            values = document.decode(folder.read(key))
            runs.append(Run(**{name: value for name, value in values.items() if name in known}))
        except (Damaged, TypeError) as error:
            fix = "delete it: then its time counts for nothing in limits.max_cost"
            raise OutputError(f"damaged ({error})", folder.where(key), fix) from error
    return runs
