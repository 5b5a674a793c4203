"""The `verify` command: reads everything back and holds it against the plan, the manifest and the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchrun.dataset.plan import carried_columns
from batchrun.dataset.rows import places_in, rows_of
from batchrun.errors import ExitCode
from batchrun.job.job import Job
from batchrun.output.output import Output
from batchrun.output.verify import Verification
from batchrun.output.verify import verify as verify_output
from batchrun.telemetry.printable import counted


@dataclass(frozen=True)
class Checked:
    """A verification, as a command reports it."""

    output: str
    found: Verification

    @property
    def exit_code(self) -> ExitCode:
        """1 where anything disagrees, 3 where rows failed."""
        if not self.found.passed:
            return ExitCode.FAILED
        return ExitCode.FAILED_ROWS if self.found.failed else ExitCode.COMPLETE

    def to_json(self) -> dict[str, Any]:
        """Plain values for a program."""
        found = self.found
        return {
            "output": self.output,
            "passed": found.passed,
            "exit_code": int(self.exit_code),
            "parts": found.parts,
            "rows": found.rows,
            "input_rows": found.rows if found.input_rows is None else found.input_rows,
            "ok": found.ok,
            "failed": found.failed,
            "problems": found.problems,
            "parts_without_digest": found.without_digest,
        }

    def lines(self) -> list[str]:
        """The same for a person; of many problems the first 20."""
        found = self.found
        rows, parts = counted(found.rows, "row"), counted(found.parts, "part")
        counts = f"{rows} = {found.ok:,} ok + {found.failed:,} failed, in {parts}"
        if found.passed:
            samples = found.rows // max(1, found.input_rows or found.rows)
            there = "once" if found.input_rows is None else f"with its {samples} samples"
            lines = [f"verified: {counts}; every row of the plan is there {there}, beside its own input"]
            if found.without_digest:
                lines.append(
                    f"note: {counted(found.without_digest, 'part')} of an earlier version, without a digest: "
                    "their pages are checked, but not every byte of their footers"
                )
            return lines
        more = [f"... and {len(found.problems) - 20} more"] if len(found.problems) > 20 else []
        return [f"NOT verified: {counts}", *found.problems[:20], *more]


def verify(job: Job) -> Checked:
    """Reads every row of the output back and holds it against the plan, the manifest and the input.

    Raises:
        OutputError: nothing was ever run into this output, or its files are damaged.
    """
    output = Output.open(job)
    plan = output.plan
    columns = carried_columns(job.input, plan.schema, job.output.partition_by)
    beside = bool(columns) or job.output.row_column is not None
    found = verify_output(
        output,
        (lambda index: rows_of(job, plan, plan.partitions[index], columns)) if beside else None,
        places_in(job, plan),
        job.answer.format,
    )
    return Checked(output.folder.name, found)
