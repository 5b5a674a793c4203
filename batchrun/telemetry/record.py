"""What a run leaves behind about itself: one small JSON object per run, for status, reports and estimates."""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from batchrun.counters import Counters
from batchrun.output import document, lease
from batchrun.output.document import Damaged
from batchrun.output.layout import JOB_FOLDER
from batchrun.storage import Folder, NotFound
from batchrun.telemetry.agreement import Agreement
from batchrun.telemetry.redact import Redactor
from batchrun.version import __version__

log = logging.getLogger(__name__)

RUNS = f"{JOB_FOLDER}runs/"
REPORT = f"{JOB_FOLDER}report.html"
LIBRARIES = ("torch", "transformers", "flash-attn", "pyarrow", "dask")


@dataclass(frozen=True, slots=True)
class SlowPartition:
    """One of the partitions that took longest: its seconds on the worker, its new rows and their tokens."""

    partition: int
    seconds: float
    rows: int
    tokens: int
    worker: str


@dataclass(frozen=True, slots=True)
class RunRecord:
    """One run as its driver saw it, last written at `seconds` after `started` (UTC, ISO 8601).

    `outcome` is running, complete, interrupted, failed or, for one that never wrote its end, killed; `message` says
    why, and `traceback` where, if it was a bug. `counts` are of what this run itself generated. `workers` is the most
    there were at once, `worker_time` their seconds added up by what they did; each has `gpus_per_worker`.
    `load_seconds` is the longest load of an engine, `busy_seconds` the time of all of them in the model; `real_tokens`
    of the `computed_tokens` were no padding, and `shared_tokens` of prompts were not computed, since another row's
    prompt begins alike. `engine_logs` are the keys of what engines printed that ended by themselves. `milestones` says
    how many seconds after the command it reached what (see `Milestones`). `agreement` is there where the
    model's weights were converted and a plan on the driver's machine had compared them. `samples` is the run over time,
    a list per quantity (see `Timeline`), all equally long.
    """

    run: str
    started: str
    outcome: str
    seconds: float
    message: str = ""
    traceback: str = ""
    plan_rows: int = 0
    partitions: int = 0
    counts: Counters = field(default_factory=Counters)
    workers: int = 0
    gpus_per_worker: int = 1
    worker_time: dict[str, float] = field(default_factory=dict)
    price_per_gpu_hour: float | None = None
    engine: str = ""
    attention: str = ""
    device: str = ""
    dtype: str = ""
    load_seconds: float = 0.0
    busy_seconds: float = 0.0
    real_tokens: int = 0
    computed_tokens: int = 0
    shared_tokens: int = 0
    batches: int = 0
    notes: list[str] = field(default_factory=list)
    engine_logs: list[str] = field(default_factory=list)
    model: str = ""
    model_fingerprint: str = ""
    job_hash: str = ""
    job: dict[str, Any] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)
    slowest: list[SlowPartition] = field(default_factory=list)
    milestones: dict[str, float] = field(default_factory=dict)
    agreement: Agreement | None = None
    samples: dict[str, list[float | None]] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """`_job/runs/20260131T020000Z-1f0c9a3e.json`: sorted by name is sorted by time."""
        return f"{RUNS}{self.started.replace('-', '').replace(':', '')}-{self.run[:8]}.json"

    @property
    def worker_seconds(self) -> float:
        """Seconds of all workers together."""
        return sum(self.worker_time.values())

    @property
    def gpus(self) -> int:
        """GPUs of all workers, the most there were at once; on CPUs, as many of those as engines' ranks."""
        return self.gpus_per_worker * self.workers

    @property
    def group(self) -> str:
        """What a worker has for its engine, as " of 2 GPUs"; empty where that is one."""
        what = "ranks" if self.device in ("", "cpu") else "GPUs"
        return f" of {self.gpus_per_worker} {what}" if self.gpus_per_worker > 1 else ""

    @property
    def gpu_seconds(self) -> float:
        """Seconds of all workers' GPUs together."""
        return self.gpus_per_worker * self.worker_seconds

    @property
    def cost(self) -> float | None:
        """Money that the GPUs' time came to, None where the job gives no price."""
        if self.price_per_gpu_hour is None:
            return None
        return self.price_per_gpu_hour * self.gpu_seconds / 3600

    @property
    def padding_efficiency(self) -> float | None:
        """Real tokens / computed tokens of the engines used, None before anything was computed."""
        return self.real_tokens / self.computed_tokens if self.computed_tokens else None


def write(folder: Folder, record: RunRecord, redact: Redactor, patience: float | None = None) -> None:
    """Puts the record in place of its earlier self, see `Folder.put`; every text in it goes through `redact`."""
    folder.put(record.key, document.encode(redact.values(asdict(record))), patience)


def read_all(folder: Folder) -> list[RunRecord]:
    """The runs into this output, oldest first; what is no whole record is left out with a warning."""
    found = (_read(folder, key) for key in sorted(folder.list(RUNS)) if key.endswith(".json"))
    return [record for record in found if record is not None]


def settle(runs: Sequence[RunRecord], holder: lease.Holder | None) -> list[RunRecord]:
    """The same runs, those called killed that say running although the output's lease is not theirs.

    Only the newest can be running, and only while its driver holds the lease.
    """
    alive = is_alive(holder)
    last = len(runs) - 1
    return [
        replace(run, outcome="killed") if run.outcome == "running" and not (alive and i == last) else run
        for i, run in enumerate(runs)
    ]


def is_alive(holder: lease.Holder | None) -> bool:
    """Whether a driver is at work, as far as its heartbeat and this machine's clock tell."""
    return holder is not None and not holder.is_dead() and time.time() - holder.heartbeat < lease.EXPIRY


def total(runs: Iterable[RunRecord]) -> Counters:
    """The counters of all runs; rows that were lost with a killed worker count in each run that generated them."""
    return sum((run.counts for run in runs), Counters())


def now() -> str:
    """This moment in ISO 8601, UTC, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def versions() -> dict[str, str]:
    """Of batchrun, Python and the libraries that decide speed and answers, as far as they are installed."""
    installed = {"batchrun": __version__, "python": platform.python_version()}
    for name in LIBRARIES:
        try:
            installed[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return installed


def machine() -> dict[str, Any]:
    """The driver's machine; what the workers' engines ran on stands in `device`."""
    return {
        "host": socket.gethostname(),
        "system": f"{sys.platform} {platform.machine()}",
        "cores": os.cpu_count(),
    }


def _read(folder: Folder, key: str) -> RunRecord | None:
    try:
        values = document.decode(folder.read(key))
        if "counts" not in values:
            _modernize(values)
        known = {f.name: values[f.name] for f in fields(RunRecord) if f.name in values}
        known["counts"] = _counters(values["counts"])
        known["slowest"] = [SlowPartition(**entry) for entry in known.get("slowest", [])]
        if agreement := known.get("agreement"):
            known["agreement"] = Agreement(**agreement)
        return RunRecord(**known)
    except NotFound:
        return None
    except (Damaged, TypeError) as error:
        log.warning("%s is skipped: %s", folder.where(key), error)
        return None


def _counters(values: dict[str, Any]) -> Counters:
    known = {f.name: values[f.name] for f in fields(Counters) if f.name in values}
    return Counters(**{**known, "examples": tuple(known.get("examples", ()))})


def _modernize(values: dict[str, Any]) -> None:
    """A record up to version 0.2, which held its counters beside everything else, and only the sum of workers' time."""
    values["counts"] = {f.name: values[f.name] for f in fields(Counters) if f.name in values}
    whole = values.get("worker_seconds", 0.0)
    loading = min(whole, values.get("load_seconds", 0.0) * values.get("workers", 0))
    generating = min(whole - loading, values.get("busy_seconds", 0.0))
    idle = whole - loading - generating
    values["worker_time"] = {"loading": loading, "generating": generating, "idle": idle}


class Timeline:
    """A run over time in a bounded number of samples: when it is full, every second one goes and the step doubles.

    The counters in it are sums since the start, so that a rate is a difference and thinning out loses none.
    """

    LIMIT = 240

    def __init__(self) -> None:
        self.step = 0.0
        self._rows: list[dict[str, float | None]] = []

    def add(self, sample: dict[str, float | None]) -> None:
        """Takes a sample, always the same keys, `seconds` among them; the last one taken is always kept."""
        seconds = sample["seconds"] or 0.0
        if len(self._rows) > 1 and seconds - (self._rows[-2]["seconds"] or 0.0) < self.step:
            # Too close to the one before the last: the newest stands for both.
            self._rows[-1] = sample
            return
        self._rows.append(sample)
        if len(self._rows) > self.LIMIT:
            self._rows = self._rows[::2]
            self.step = 2 * seconds / self.LIMIT

    def columns(self) -> dict[str, list[float | None]]:
        """The samples kept, a list per quantity, all equally long."""
        names = self._rows[0] if self._rows else {}
        return {name: [_short(row[name]) for row in self._rows] for name in names}


def _short(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else round(value, 4)
