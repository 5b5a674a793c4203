"""What is remembered of a model's throughput: in the user's cache, and in the records of an output's runs."""

from __future__ import annotations

import json
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from batchrun.cluster.local import visible_gpus
from batchrun.driver.prepare import Prepared
from batchrun.engine.choose import BUILT_IN
from batchrun.engine.launch import available_cores
from batchrun.estimate.cost import Observation, Throughput
from batchrun.hashing import stable_hash
from batchrun.telemetry import record
from batchrun.telemetry.record import RunRecord
from batchrun.version import __version__

log = logging.getLogger(__name__)

STRETCHES = 12  # that an earlier run is cut into, to see how steady it was


def device_name() -> str:
    """This machine's GPU, or its processor and the number of cores that may be used."""
    if visible_gpus():
        import torch  # seconds, where nothing else has needed it

        return str(torch.cuda.get_device_name())
    return f"{_processor()}, {available_cores()} cores"


def remember(fingerprint: str, kind: str, job_hash: str | None, known: Throughput) -> Path:
    """Writes a trial's or a bench's throughput for later plans on this machine, in place of its like.

    Args:
        fingerprint: of the model, as a job's output pins it.
        kind: the engine as the job file names it.
        job_hash: of the job whose rows were run, where they were run as the job says.
    """
    path = _place(fingerprint, known.device, known.engine, known.own_rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    values = asdict(known) | {
        "kind": kind,
        "job_hash": job_hash,
        "fingerprint": fingerprint,
        "version": __version__,
    }
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)
    return path


def recall(prepared: Prepared) -> Throughput | None:
    """The best that is known: earlier runs into this output, a trial of this job, of others, then a bench.

    Of the latter three only what this version of batchrun measured with this model on this kind of machine.
    """
    return _from_runs(prepared) or _from_cache(prepared)


def _from_runs(prepared: Prepared) -> Throughput | None:
    seen: list[Observation] = []
    rows, start = 0, 0.0
    for run in record.read_all(prepared.folder):
        stretches, began = _stretches(run)
        if stretches:
            seen += stretches
            rows, start = rows + run.counts.rows, began
    if not seen:
        return None
    return Throughput(f"earlier runs into this output, {rows:,} rows", "", "", seen, True, start)


def _stretches(run: RunRecord) -> tuple[list[Observation], float]:
    """A run from its first finished rows on, cut into stretches, and the seconds before them."""
    names = ("seconds", "workers", "rows", "prompt_tokens", "output_tokens")
    samples = np.array([run.samples.get(name, []) for name in names], float).T
    began = int(np.argmax(samples[:, 2] > 0)) if samples[:, 2].any() else len(samples)
    samples = samples[began:]
    if not len(samples):
        return [], 0.0
    # Equal shares of the rows: a batch's rows come all at once, so that equal times would hold none or many.
    shares = np.linspace(0, 1, STRETCHES + 1) * samples[-1, 2]
    ends = np.unique(np.searchsorted(samples[:, 2], shares)).tolist()
    observations = []
    for first, last in pairwise(ends):
        steps = samples[first : last + 1]
        rows, prompt, output = steps[-1, 2:] - steps[0, 2:]
        if rows > 0:
            seconds = float(np.diff(steps[:, 0]) @ steps[1:, 1])
            observations.append(Observation(int(rows), int(prompt), int(output), seconds))
    return observations, float(samples[0, 0])


def _from_cache(prepared: Prepared) -> Throughput | None:
    device, kind = device_name(), prepared.job.engine.kind
    job_hash = prepared.identity.job_hash
    found = [
        (values["job_hash"] == job_hash, known.own_rows, known)
        for values, known in _remembered(prepared.model.fingerprint)
        if known.device == device and _same_engine(kind, values["kind"], known.engine)
    ]
    if not found:
        return None
    same_job, _, known = max(found, key=lambda entry: entry[:2])
    own_rows = known.own_rows and same_job
    return Throughput(known.source, known.engine, device, known.observations, own_rows, known.start_seconds)


def _remembered(fingerprint: str) -> Iterator[tuple[dict[str, Any], Throughput]]:
    for path in sorted(_folder().glob(f"{fingerprint[:16]}-*.json")):
        try:
            values = json.loads(path.read_text())
            if (values["fingerprint"], values["version"]) != (fingerprint, __version__):
                continue
            seen = [Observation(**o) for o in values["observations"]]
            names = ("source", "engine", "device", "own_rows", "start_seconds")
            known = Throughput(observations=seen, **{name: values[name] for name in names})
            yield {name: values[name] for name in ("kind", "job_hash")}, known
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s is left out: %s", path, error)


def _same_engine(asked: str, kind: str, engine: str) -> bool:
    return asked in (kind, engine) or (asked == "auto" and engine in BUILT_IN)


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchrun" / "throughput"


def _place(fingerprint: str, device: str, engine: str, own_rows: bool) -> Path:
    kind = "trial" if own_rows else "bench"
    machine = stable_hash([device, engine, __version__])[:16]
    return _folder() / f"{fingerprint[:16]}-{kind}-{machine}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
