"""What an output says of itself, to any machine that can read the store: its state."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from batchrun.job.job import Job
from batchrun.output import chunk, lease, manifest, state
from batchrun.output.chunk import BadChunk, Origin
from batchrun.output.layout import PARTIAL
from batchrun.output.output import Output
from batchrun.report.summary import error_lines, number
from batchrun.storage import NotFound
from batchrun.telemetry import record
from batchrun.telemetry.printable import counted
from batchrun.telemetry.progress import duration
from batchrun.telemetry.record import RunRecord
from batchrun.units import size

# Partitions whose chunks are read at a time.
READERS = 16
SHOWN_RUNS = 5
SHOWN_OF_RUN = (
    "run", "started", "outcome", "message", "seconds", "workers", "gpus_per_worker", "worker_seconds", "worker_time",
    "gpu_seconds", "cost", "engine", "device", "engine_logs",
)  # fmt: skip


@dataclass(frozen=True)
class Status:
    """How far an output is. `rows_committed` stand in parts, `rows_staged` wait in chunks for theirs.

    `errors` are failed rows by code, `failed` in all, some of them as `examples`: of the whole output once it is
    complete, until then as the runs counted them. `plans` is 1, or more where the input grew. `retries` were begun;
    an unfinished one is `retrying`. `driver` holds the lease; `runs` are all runs into the output, oldest first, each
    as its record was last written. Rows are the input's. With several `samples` of each in rows of their own, `errors`
    and `failed` of a complete output count samples.
    """

    output: str
    complete: bool
    rows: int
    rows_committed: int
    rows_staged: int
    partitions: int
    committed: int
    begun: int
    staged_bytes: int
    errors: dict[str, int]
    driver: str | None
    plans: int
    retries: int
    retrying: bool
    failed: int
    examples: dict[str, list[str]]
    runs: list[RunRecord]
    samples: int = 1

    def to_json(self) -> dict[str, Any]:
        """Plain values for a program; of each run what `SHOWN_OF_RUN` names, and its counters."""
        runs = [
            {**{name: getattr(run, name) for name in SHOWN_OF_RUN}, **asdict(run.counts)} for run in self.runs
        ]
        return {**self.__dict__, "runs": runs}

    def lines(self) -> list[str]:
        """The same for a person."""
        share = self.rows_committed / self.rows if self.rows else float(self.complete)
        how = "complete" if self.complete else f"{share:.0%} committed"
        grown = f", of {self.plans} plans" if self.plans > 1 else ""
        lines = [
            f"{how}: {self.rows_committed:,} of {self.rows:,} rows in {self.committed:,} of "
            f"{self.partitions:,} parts{grown}: {self.output}/data"
        ]
        if self.failed:
            what = "sample" if self.samples > 1 and self.complete else "row"
            lines += [f"{counted(self.failed, what)} failed", *error_lines(self.errors, self.examples)]
        if self.begun:
            lines.append(
                f"{counted(self.begun, 'more partition')} begun, {counted(self.rows_staged, 'row')} finished "
                f"({size(self.staged_bytes)} staged)"
            )
        lines += [line for run in self.runs[-SHOWN_RUNS:] for line in _run_lines(run)]
        if not self.complete:
            command = "retry" if self.retrying else "run"
            lines.append(
                f"{'retrying' if self.retrying else 'running'}: {self.driver}"
                if self.driver
                else f"no {command} is active; `batchrun {command}` goes on"
            )
        return lines


def _run_lines(run: RunRecord) -> Iterator[str]:
    rate = run.counts.tokens / run.seconds if run.seconds else 0.0
    cost = "" if run.cost is None else f", cost {run.cost:,.2f}"
    counts = run.counts
    copied = f", {counts.copied:,} copied" if counts.copied else ""
    done = counted(counts.rows - counts.copied, "row")
    yield (
        f"run of {run.started}: {run.outcome} after {duration(run.seconds)}, {done} "
        f"done{copied}, {number(rate)} tokens/s, {counted(run.workers, 'worker')}{run.group}{cost}"
    )
    if run.engine_logs:
        more = f" to {run.engine_logs[-1].rpartition('/')[2]}" if len(run.engine_logs) > 1 else ""
        yield f"  {counted(len(run.engine_logs), 'engine')} ended unasked; last output: {run.engine_logs[0]}{more}"


def status(job: Job) -> Status:
    """Reads listing, plan, staged rows, runs and lease from the output; neither input nor cluster is asked.

    Raises:
        OutputError: nothing was ever run into this output, or its files are damaged.
    """
    output = Output.open(job)
    folder, layout = output.folder, output.layout
    found = output.scan()
    rows = np.array(output.rows)
    written = manifest.read(folder)
    holder = lease.read(folder)
    runs = record.settle(record.read_all(folder), holder)
    errors = written.errors if written else record.total(runs).errors
    return Status(
        output=folder.name,
        complete=written is not None and written.describes(found),
        rows=output.plan.rows,
        rows_committed=int(rows[found.committed].sum()),
        rows_staged=_rows_staged(output, np.flatnonzero(found.streaming).tolist()),
        partitions=layout.partitions,
        committed=int(found.committed.sum()),
        begun=int(found.streaming.sum()),
        staged_bytes=int(found.staged_bytes[found.streaming].sum()),
        errors=errors,
        driver=_driver(holder),
        plans=max(1, len(layout.plans)),
        retries=found.retries,
        retrying=unfinished_retry(written, found) > 0,
        failed=sum(errors.values()),
        examples=written.examples if written else {},
        runs=runs,
        samples=output.settings.rows_of_row,
    )


def _driver(holder: lease.Holder | None) -> str | None:
    if holder is None or not record.is_alive(holder):
        return None
    age = max(0.0, time.time() - holder.heartbeat)
    return f"{holder}, last heartbeat {duration(age)} ago"


def _rows_staged(output: Output, partitions: list[int]) -> int:
    """Rows that whole chunks hold, each once: what the next attempts will not generate again."""
    folder, layout, settings = output.folder, output.layout, output.settings
    schema, each = chunk.answers_schema(settings.columns, settings.samples_of_row), settings.rows_of_row

    def count(partition: int) -> int:
        origin = Origin(layout.hash_of(partition), output.identity.job_hash, partition)
        staged = np.zeros(output.rows[partition] * each, dtype=bool)
        chunks = [key for key in folder.list(layout.stage(partition)) if not key.endswith(PARTIAL)]
        for key in chunks:
            try:
                table = chunk.decode(folder.read(key), origin, len(staged), schema)
                staged[table["row"].to_numpy()] = True
            except (BadChunk, NotFound):
                # Cut short, or swept since it was listed: an attempt would say the same.
                continue
        # All samples of a row are staged together.
        return int(staged.sum()) // each

    with ThreadPoolExecutor(READERS) as pool:
        return sum(pool.map(count, partitions))


def unfinished_retry(written: manifest.Manifest | None, found: state.State) -> int:
    """The number of the retry that was begun and has not finished, by the manifest; 0 where there is none."""
    recorded = len(written.retries) if written else 0
    unfinished = written is not None and written.unfinished is not None
    return found.retries if found.retries > recorded or unfinished else 0
