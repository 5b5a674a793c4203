"""What an output says of itself, to any machine that can read the store: its state, its verification, its leftovers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from batchrun.dataset.plan import Plan, carried_columns
from batchrun.errors import ExitCode, OutputError
from batchrun.job import Job
from batchrun.output import identity, lease, manifest, state
from batchrun.output.layout import PLAN, Layout
from batchrun.output.verify import Verification
from batchrun.output.verify import clean as clean_folder
from batchrun.output.verify import verify as verify_folder
from batchrun.prepare import rows_of
from batchrun.report.summary import size
from batchrun.storage import Folder, NotFound


@dataclass(frozen=True)
class Status:
    """How far an output is. `rows_committed` stand in parts; partitions that were begun have staged bytes."""

    output: str
    complete: bool
    rows: int
    rows_committed: int
    partitions: int
    committed: int
    begun: int
    staged_bytes: int
    driver: str | None

    def to_json(self) -> dict[str, Any]:
        return dict(self.__dict__)

    def lines(self) -> list[str]:
        share = self.rows_committed / self.rows if self.rows else float(self.complete)
        how = "complete" if self.complete else f"{share:.0%} committed"
        lines = [
            f"{how}: {self.rows_committed:,} of {self.rows:,} rows in {self.committed:,} of "
            f"{self.partitions:,} parts: {self.output}/data"
        ]
        if self.begun:
            lines.append(f"{self.begun:,} more partitions begun, {size(self.staged_bytes)} staged")
        if not self.complete:
            lines.append(
                f"running: {self.driver}" if self.driver else "no run is active; `batchrun run` goes on"
            )
        return lines


@dataclass(frozen=True)
class Checked:
    """A verification, as a command reports it."""

    output: str
    found: Verification

    @property
    def exit_code(self) -> ExitCode:
        if not self.found.passed:
            return ExitCode.FAILED
        return ExitCode.FAILED_ROWS if self.found.failed else ExitCode.COMPLETE

    def to_json(self) -> dict[str, Any]:
        found = self.found
        return {
            "output": self.output,
            "passed": found.passed,
            "exit_code": int(self.exit_code),
            "parts": found.parts,
            "rows": found.rows,
            "ok": found.ok,
            "failed": found.failed,
            "problems": found.problems,
        }

    def lines(self) -> list[str]:
        found = self.found
        counts = f"{found.rows:,} rows = {found.ok:,} ok + {found.failed:,} failed, in {found.parts:,} parts"
        if found.passed:
            return [f"verified: {counts}; every row of the plan stands once, beside its own input"]
        more = [f"... and {len(found.problems) - 20} more"] if len(found.problems) > 20 else []
        return [f"NOT verified: {counts}", *found.problems[:20], *more]


def status(job: Job) -> Status:
    """Reads listing, plan and lease from the output; neither the input nor a cluster is asked.

    Raises:
        OutputError: nothing was ever run into this output, or its files are damaged.
    """
    folder, _, plan, layout = open_output(job)
    found = state.scan(folder, layout)
    rows = np.array([partition.rows for partition in plan.partitions])
    written = manifest.read(folder)
    holder = lease.read(folder)
    return Status(
        output=folder.name,
        complete=written is not None and written.describes(found),
        rows=plan.rows,
        rows_committed=int(rows[found.committed].sum()),
        partitions=layout.partitions,
        committed=int(found.committed.sum()),
        begun=int(found.streaming.sum()),
        staged_bytes=int(found.staged_bytes[found.streaming].sum()),
        driver=None if holder is None or holder.is_dead() else f"{holder.host}, process {holder.pid}",
    )


def verify(job: Job) -> Checked:
    """Reads every row of the output back and holds it against the plan, the manifest and the input.

    Raises:
        OutputError: nothing was ever run into this output, or its files are damaged.
    """
    folder, pinned, plan, layout = open_output(job)
    columns = carried_columns(job.input, plan.schema)
    found = verify_folder(
        folder,
        layout,
        pinned.job_hash,
        [partition.rows for partition in plan.partitions],
        job.output,
        (lambda index: rows_of(job, plan, plan.partitions[index], columns)) if columns else None,
    )
    return Checked(folder.name, found)


def clean(job: Job, everything: bool = False) -> list[str]:
    """Deletes leftovers of interrupted runs, or with `everything` all that batchrun owns; the keys deleted."""
    folder = Folder(job.output.path, job.output.storage_options)
    if everything:
        return clean_folder(folder, everything=True)
    _, _, _, layout = open_output(job)
    return clean_folder(folder, layout)


def open_output(job: Job) -> tuple[Folder, identity.Identity, Plan, Layout]:
    """The output as the job's first run pinned it. Raises OutputError where there is none or it is damaged."""
    folder = Folder(job.output.path, job.output.storage_options)
    pinned = identity.read(folder)
    if pinned is None:
        raise OutputError("no run was ever started here", folder.name, "start one with `batchrun run`")
    try:
        plan = Plan.from_parquet(folder.read(PLAN))
    except NotFound:
        raise OutputError(
            "the plan is missing", folder.where(PLAN), "`batchrun run` writes it again"
        ) from None
    return folder, pinned, plan, Layout(pinned.plan_hash, len(plan.partitions))
