"""What is remembered of a model's throughput: in the user's cache, and in the records of an output's runs."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from itertools import pairwise
from pathlib import Path

import numpy as np

from batchrun.driver.prepare import Prepared
from batchrun.engine.choose import BUILT_IN
from batchrun.engine.processes.launch import available_cores
from batchrun.estimate.cost import Observation, Throughput
from batchrun.hashing import stable_hash
from batchrun.model.fingerprint import cache_folder
from batchrun.telemetry import record
from batchrun.telemetry.gpu import visible_gpus
from batchrun.telemetry.record import RunRecord
from batchrun.version import __version__

log = logging.getLogger(__name__)

# Stretches that an earlier run is cut into, to see how steady it was.
STRETCHES = 12
# Another job's trial serves if it ran so many tokens, and if its prompts are at most so much longer or shorter on
# average: a token's cost depends on both.
ENOUGH_TOKENS = 20_000
NEAR = 2.0


@dataclass(frozen=True, slots=True)
class _Measured:
    """A trial or bench as the cache has it, with the engine as that job file named it; `job_hash` None for a bench,
    `when` in seconds since the epoch."""

    kind: str
    job_hash: str | None
    when: float
    known: Throughput

    @property
    def tokens(self) -> int:
        """Of all prompts and answers that were timed."""
        return sum(o.prompt_tokens + o.output_tokens for o in self.known.observations)

    @property
    def mean_prompt(self) -> float:
        """Tokens."""
        seen = self.known.observations
        rows = sum(o.times * o.rows for o in seen)
        return sum(o.times * o.prompt_tokens for o in seen) / rows if rows else 0.0

    def serves(self, job_hash: str, mean_prompt: float) -> bool:
        """Whether an estimate for the job may rest on it."""
        if self.job_hash in (job_hash, None):
            return True
        near = mean_prompt / NEAR <= self.mean_prompt <= mean_prompt * NEAR
        # A job that scores what is given says nothing of what an output token costs.
        generated = any(o.output_tokens for o in self.known.observations)
        return near and generated and self.tokens >= ENOUGH_TOKENS


def device_name() -> str:
    """This machine's GPU, or its processor and the number of cores that may be used."""
    if visible_gpus():
        # Seconds, where nothing else has needed it.
        import torch

        return str(torch.cuda.get_device_name())
    return f"{_processor()}, {available_cores()} cores"


def model_key(prepared: Prepared) -> str:
    """The model as the job runs it: its fingerprint, and what of it is in fp8 by the job's wish, if anything is."""
    fingerprint, in_fp8 = prepared.model.fingerprint, prepared.job.fp8
    return stable_hash([fingerprint, in_fp8]) if in_fp8 else fingerprint


def remember(fingerprint: str, kind: str, job_hash: str | None, known: Throughput) -> Path:
    """Writes a trial's or a bench's throughput for later plans on this machine, in place of its like: the last bench,
    or the same job's last trial, unless that one ran more tokens.

    Args:
        fingerprint: the model's, see `model_key`.
        kind: the engine as the job file names it.
        job_hash: of the job whose rows were run, where they were run as the job says.
    """
    path = _place(fingerprint, job_hash, known)
    new = _Measured(kind, job_hash, time.time(), known)
    before = _read(path, fingerprint) if job_hash is not None and path.exists() else None
    if before is not None and before.tokens > new.tokens:
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    values = asdict(known) | {
        "kind": kind,
        "job_hash": job_hash,
        "when": new.when,
        "fingerprint": fingerprint,
        "version": __version__,
    }
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(values))
    temporary.replace(path)
    return path


def recall(prepared: Prepared, mean_prompt: float) -> Throughput | None:
    """The best that is known: earlier runs into this output, a trial of this job, of others, then a bench.

    Of the latter three only what this version of batchrun measured with this model on this kind of machine; of other
    jobs' trials only one of ENOUGH_TOKENS whose prompts are NEAR this job's `mean_prompt` tokens.
    """
    return _from_runs(prepared) or _from_cache(prepared, mean_prompt)


def _from_runs(prepared: Prepared) -> Throughput | None:
    seen: list[Observation] = []
    rows, start = 0, 0.0
    for run in record.read_all(prepared.folder):
        # One engine on more GPUs is another one, by its speed.
        if run.gpus_per_worker != prepared.gpus:
            continue
        stretches, began = _stretches(run)
        if stretches:
            seen += stretches
            rows, start = rows + run.counts.rows, began
    if not seen:
        return None
    return Throughput(
        f"earlier runs into this output, {rows:,} rows", "", "", seen, True, start, prepared.gpus
    )


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


def _from_cache(prepared: Prepared, mean_prompt: float) -> Throughput | None:
    device, kind = device_name(), prepared.job.engine.kind
    job_hash = prepared.identity.job_hash
    found = [
        one
        for one in _remembered(model_key(prepared))
        if (one.known.device, one.known.gpus) == (device, prepared.gpus)
        and _same_engine(kind, one.kind, one.known.engine)
        and one.serves(job_hash, mean_prompt)
    ]
    if not found:
        return None
    best = max(found, key=lambda one: (one.job_hash == job_hash, one.known.own_rows, one.tokens))
    own_rows = best.known.own_rows and best.job_hash == job_hash
    return replace(best.known, source=_source(best, job_hash), own_rows=own_rows)


def _source(best: _Measured, job_hash: str) -> str:
    """What was measured, of which job, and when."""
    when = f"{datetime.fromtimestamp(best.when):%Y-%m-%d %H:%M}"
    if best.job_hash is None:
        return f"{best.known.source}, on {when}"
    if best.job_hash == job_hash:
        return f"{best.known.source}, of this job, on {when}"
    other = f"of another job whose prompts have {best.mean_prompt:,.0f} tokens on average"
    return f"{best.known.source}, {other}, on {when}"


def _remembered(fingerprint: str) -> Iterator[_Measured]:
    for path in sorted(_folder().glob(f"{fingerprint[:16]}-*.json")):
        one = _read(path, fingerprint)
        if one is not None:
            yield one


def _read(path: Path, fingerprint: str) -> _Measured | None:
    """None for another model's or version's, and, with a warning, for one that is damaged."""
    try:
        values = json.loads(path.read_text())
        if (values["fingerprint"], values["version"]) != (fingerprint, __version__):
            return None
        seen = [Observation(**o) for o in values["observations"]]
        names = ("source", "engine", "device", "own_rows", "start_seconds")
        known = Throughput(
            observations=seen, **{name: values[name] for name in names}, gpus=values.get("gpus", 1)
        )
        # The first files had no time of their own.
        when = float(values.get("when", path.stat().st_mtime))
        return _Measured(values["kind"], values["job_hash"], when, known)
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.warning("%s is left out: %s", path, error)
        return None


def _same_engine(asked: str, kind: str, engine: str) -> bool:
    return asked in (kind, engine) or (asked == "auto" and engine in BUILT_IN)


def _folder() -> Path:
    return cache_folder() / "throughput"


def _place(fingerprint: str, job_hash: str | None, known: Throughput) -> Path:
    kind = "trial" if known.own_rows else "bench"
    device = known.device if known.gpus == 1 else f"{known.gpus} x {known.device}"
    like = stable_hash([device, known.engine, __version__, job_hash])[:16]
    return _folder() / f"{fingerprint[:16]}-{kind}-{like}.json"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
