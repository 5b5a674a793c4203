"""An output as a command finds it: the folder, whose it is, its plan, and where its keys are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from batchrun.dataset.plan import Plan, folders_of, joined
from batchrun.errors import OutputError
from batchrun.job.job import Job
from batchrun.job.output import OutputSettings
from batchrun.output import identity, plans, state
from batchrun.output.failed_rows import FailedRows
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.output.state import State
from batchrun.storage import Folder
from batchrun.storage.folder import first_contact


def open_folder(job: Job) -> Folder:
    """The folder that the job's output is in, or will be."""
    return Folder(job.output.path, job.output.storage_options)


def layout_of(plans: Sequence[Plan], partition_by: Sequence[str]) -> Layout:
    """The keys of an output with these plans, its parts in folders of the keys `partition_by`."""
    folders = folders_of(joined(plans), partition_by)
    return Layout.of([(plan.hash, len(plan.partitions)) for plan in plans], folders)


@dataclass(frozen=True)
class Output:
    """An output that a job was run into, opened once by a command or a run.

    `identity` is what the first run pinned, `plan` all plans of the output as one, `layout` its keys. None of them ever
    changes but by a run that adds a plan; `settings` are those of the job at hand.
    """

    folder: Folder
    settings: OutputSettings
    identity: Identity
    plan: Plan
    layout: Layout

    @classmethod
    def find(cls, job: Job) -> Output | None:
        """The job's output; None where nothing was ever run into it.

        Raises:
            OutputError: its files are damaged, or nobody may read them.
        """
        folder = open_folder(job)
        with first_contact():
            pinned = identity.read(folder)
        if pinned is None:
            return None
        stored = plans.read(folder)
        if not stored:
            raise OutputError("the plan is missing", folder.name, "`batchrun run` writes it again")
        layout = layout_of(stored, pinned.settings["output"].get("partition_by", []))
        return cls(folder, job.output, pinned, joined(stored), layout)

    @classmethod
    def open(cls, job: Job) -> Output:
        """The job's output, which has to be there.

        Raises:
            OutputError: nothing was ever run into it, or as `find`.
        """
        if found := cls.find(job):
            return found
        where = open_folder(job).name
        raise OutputError("no run was ever started here", where, "start one with `batchrun run`")

    @cached_property
    def rows(self) -> list[int]:
        """How many rows of the input each partition has, by the plan."""
        return [partition.rows for partition in self.plan.partitions]

    @property
    def failed_rows(self) -> FailedRows:
        """The dataset of its failed rows, if `settings` want one."""
        return FailedRows(self.folder, self.layout, self.settings)

    def scan(self) -> State:
        """How far it is now: one listing."""
        return state.scan(self.folder, self.layout)
