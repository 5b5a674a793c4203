"""What the runs of an output have cost so far: one small document for each, kept up to date while it goes on."""

from __future__ import annotations

import logging
import time
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Self

from batchrun.errors import BatchrunError, OutputError
from batchrun.output import document
from batchrun.output.document import Damaged
from batchrun.output.layout import LEDGER
from batchrun.storage import Folder

if TYPE_CHECKING:
    from batchrun.report.progress import Progress, Watch

log = logging.getLogger(__name__)

EVERY = 30.0  # seconds between two writes: what a killed driver leaves uncounted at most


@dataclass(slots=True)
class Run:
    """One run: `worker_seconds` sums up over its workers from the first one on, one of which is one GPU.

    `start_seconds` passed before its first rows were finished, `start_worker_seconds` over all its workers. Rows and
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


class Ledger:
    """This run's entry, a context that writes it at its end; `see` is a watch that passes everything on."""

    def __init__(self, folder: Folder, run: str, watch: Watch) -> None:
        self.folder, self.run, self.watch = folder, Run(run), watch
        self.earlier_worker_seconds = sum(entry.worker_seconds for entry in read(folder))
        self._key = f"{LEDGER}{int(self.run.started)}-{run[:8]}.json"
        self._written = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()

    def see(self, now: Progress) -> None:
        run = self.run
        run.worker_seconds += now.workers * (now.seconds - run.seconds)
        run.seconds = now.seconds
        if not run.rows:
            run.start_seconds, run.start_worker_seconds = run.seconds, run.worker_seconds
        run.rows, run.prompt_tokens, run.output_tokens = now.new_rows, now.prompt_tokens, now.output_tokens
        self.watch(now)
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
