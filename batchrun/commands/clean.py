"""The `clean` command: deletes what interrupted runs left, or all that batchrun wrote."""

from __future__ import annotations

from batchrun.commands.status import unfinished_retry
from batchrun.job.job import Job
from batchrun.output import manifest, state
from batchrun.output.output import open_folder, open_output
from batchrun.output.verify import clean as clean_folder


def clean(job: Job, everything: bool = False) -> list[str]:
    """Deletes leftovers of interrupted runs, or with `everything` all that batchrun owns; the keys deleted."""
    failed = job.output.failed
    if everything:
        return clean_folder(open_folder(job), everything=True, failed_folder=failed)
    folder, _, _, layout = open_output(job)
    retrying = unfinished_retry(manifest.read(folder), state.scan(folder, layout))
    return clean_folder(folder, layout, retrying=retrying)
