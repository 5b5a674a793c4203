"""An output as its first run pinned it: the folder, whose it is, its plan, and where its keys are."""

from __future__ import annotations

from collections.abc import Sequence

from batchrun.dataset.plan import Plan, folders_of, joined
from batchrun.errors import OutputError
from batchrun.job.job import Job
from batchrun.output import identity, plans
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.storage import Folder
from batchrun.storage.folder import first_contact


def open_folder(job: Job) -> Folder:
    """The folder that the job's output is in, or will be."""
    return Folder(job.output.path, job.output.storage_options)


def layout_of(plans: Sequence[Plan], partition_by: Sequence[str]) -> Layout:
    """The keys of an output with these plans, its parts in folders of the keys `partition_by`."""
    folders = folders_of(joined(plans), partition_by)
    return Layout.of([(plan.hash, len(plan.partitions)) for plan in plans], folders)


def partitioned_by(pinned: Identity) -> list[str]:
    """The keys of the folders that the output's parts are in."""
    keys: list[str] = pinned.settings["output"].get("partition_by", [])
    return keys


def open_output(job: Job) -> tuple[Folder, Identity, Plan, Layout]:
    """The output as the job's first run pinned it.

    Raises:
        OutputError: nothing was ever run into this output, or its files are damaged.
    """
    folder = open_folder(job)
    with first_contact():
        pinned = identity.read(folder)
    if pinned is None:
        raise OutputError("no run was ever started here", folder.name, "start one with `batchrun run`")
    stored = plans.read(folder)
    if not stored:
        raise OutputError("the plan is missing", folder.name, "`batchrun run` writes it again")
    return folder, pinned, joined(stored), layout_of(stored, partitioned_by(pinned))
