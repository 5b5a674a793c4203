"""The `clean` command: deletes what interrupted runs left, or all that batchrun wrote."""

from __future__ import annotations

from collections.abc import Callable

from batchrun.commands.status import unfinished_retry
from batchrun.driver.overlap import covers
from batchrun.errors import ChangedError, LeaseHeld, OutputError
from batchrun.job.job import Job
from batchrun.output import clean as cleaning
from batchrun.output import identity, manifest, retry
from batchrun.output.layout import JOB
from batchrun.output.lease import Lease
from batchrun.output.output import Output, open_folder
from batchrun.telemetry import record
from batchrun.telemetry.printable import counted
from batchrun.telemetry.progress import duration

Confirm = Callable[[str], None]


def clean(job: Job, everything: bool = False, confirm: Confirm | None = None) -> list[str]:
    """Deletes leftovers of interrupted runs, or with `everything` all that batchrun owns; the keys deleted.

    `confirm` is called before `everything` is deleted, with a line that says what that is; it raises to prevent it.

    Raises:
        OutputError: nothing was ever run into this output, or its files are damaged.
        ChangedError: the output is another job's.
        LeaseHeld: a driver is at work.
    """
    output = Output.find(job)
    # Behind a link it would be another output's.
    if output is None or JOB not in output.folder.list(follow_links=False):
        raise OutputError("no run was ever started here", open_folder(job).name, "check output.path")
    _refuse_other_job(job, output)
    if everything and confirm is not None:
        confirm(_worth(output))
    try:
        with Lease(output.folder):
            keys = _keys(output, everything)
            cleaning.delete(output.folder, keys)
    except LeaseHeld as held:
        fix = "stop it first; the lease of a driver that is gone ends after a minute"
        raise LeaseHeld(held.what, held.where, fix) from None
    return keys


def _keys(output: Output, everything: bool) -> list[str]:
    written = manifest.read(output.folder)
    if not everything:
        return cleaning.leftovers(output, unfinished_retry(written, output.scan()))
    failed = {output.settings.failed, written.failed_folder if written else None}
    return cleaning.owned(output, [name for name in failed if name])


def _refuse_other_job(job: Job, output: Output) -> None:
    """By what the output itself and the job file say: neither model nor input is looked at."""
    settings = job.deciding()
    written = job.as_written(settings)
    name = job.as_written()["model"]["name"]
    differences = []
    for one in [output.identity, *(past.identity for past in retry.read(output.folder))]:
        changed = identity.settings_changes(one, written, identity.digests(settings, written))
        if one.model and one.model != name:
            changed["model.name"] = f"model.name: {one.model} -> {name}"
        differences.append(list(changed.values()))
    lines = [] if [] in differences else differences[0]
    options = job.input.storage_options
    files = [file.path for file in output.plan.files]
    if foreign := [
        file for file in files if not any(covers(path, file, options) for path in job.input.paths)
    ]:
        lines.append(f"its input was {foreign[0]}" + (", ..." if len(foreign) > 1 else ""))
    if lines:
        raise ChangedError(
            f"nothing deleted: it holds answers of another job ({'; '.join(lines)})",
            output.folder.name,
            "clean it with the job file that it was made with, or delete the folder yourself",
        )


def _worth(output: Output) -> str:
    """What would be lost: rows, and what they cost."""
    committed = output.scan().committed
    rows = sum(rows for rows, there in zip(output.rows, committed, strict=True) if there)
    runs = record.read_all(output.folder)
    time = duration(sum(run.gpu_seconds for run in runs))
    prices = [run.cost for run in runs if run.cost is not None]
    cost = f", which cost {sum(prices):,.2f} ({time} of GPUs' time)" if prices else f" ({time} of GPUs' time)"
    answered, parts = counted(rows, "answered row"), counted(int(committed.sum()), "part")
    return f"{answered} in {parts} of {output.folder.name}{cost}"
