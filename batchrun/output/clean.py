"""What may be deleted of an output: only objects that batchrun wrote for its own plans, never through a link."""

from __future__ import annotations

import re
import time
from collections.abc import Iterable, Iterator

from batchrun.output import failed_rows
from batchrun.output.layout import (
    DATA,
    JOB,
    JOB_FOLDER,
    LEASE,
    MANIFEST,
    PLANS,
    RETRIES,
    STAGE,
    TEMPORARY,
    Layout,
    retry_of_chunk,
)
from batchrun.output.output import Output
from batchrun.storage import Folder

# A temporary file older than this belongs to no put that is still running.
STALE_SECONDS = 3600.0

# Of drivers that died while they tried the store.
PROBES = f"{JOB_FOLDER}probe-"

_RECORD = re.compile(
    rf"{JOB}|{MANIFEST}|{LEASE}|{JOB_FOLDER}report\.html|{JOB_FOLDER}runs/\d{{8}}T\d{{6}}Z-[^/]+\.json"
    rf"|{JOB_FOLDER}runs/[0-9a-f]{{8}}-engine-\d+\.log"
    rf"|{PLANS}\d{{5,}}\.parquet|{RETRIES}\d{{5,}}\.json"
)


def leftovers(output: Output, retrying: int = 0) -> list[str]:
    """Keys that finished or killed runs may have left and that no run needs any more, sorted.

    That is, what is staged for partitions that are committed, and by retries other than the unfinished one
    (`retrying`, 0 where there is none); temporary files of writes long dead.
    """
    keys = output.folder.list(follow_links=False)
    return sorted([*_swept(keys, output.layout, retrying), *_stale(output.folder, keys)])


def owned(output: Output, failed_folders: Iterable[str] = ()) -> list[str]:
    """Every key that batchrun wrote for these plans, sorted: parts, files of failed rows, and what is in _job/.

    `failed_folders` are the names that the folder of failed rows has, or had. Files of others, parts of other
    plans, and whatever lies behind a symbolic link are not among them.
    """
    keys = output.folder.list(follow_links=False)
    return sorted(key for key in keys if _is_owned(key, output.layout, set(failed_folders)))


def delete(folder: Folder, keys: list[str]) -> None:
    """Deletes the keys and aborts unfinished multipart uploads below the folder."""
    folder.abort_uploads()
    # Who is killed in between finds job.json, and so the same output, the next time.
    folder.delete([key for key in keys if key != JOB])
    folder.delete([key for key in keys if key == JOB])


def _is_owned(key: str, layout: Layout, failed_folders: set[str]) -> bool:
    if key.startswith(DATA):
        return layout.partition_of_part(key) is not None
    if key.startswith(STAGE):
        return layout.partition_of_any_chunk(key) is not None
    if key.startswith((TEMPORARY, PROBES)):
        return True
    return _RECORD.fullmatch(key) is not None or any(
        failed_rows.partition_of(key, name, layout) is not None for name in failed_folders
    )


def _swept(keys: Iterable[str], layout: Layout, retrying: int) -> Iterator[str]:
    committed = {layout.partition_of_part(key) for key in keys if key.startswith(DATA)} - {None}
    for key in keys:
        if not key.startswith(STAGE) or layout.partition_of_any_chunk(key) is None:
            continue
        if layout.partition_of_chunk(key) in committed or retry_of_chunk(key) not in (0, retrying):
            yield key


def _stale(folder: Folder, keys: Iterable[str]) -> Iterator[str]:
    for key in keys:
        if key.startswith((TEMPORARY, PROBES)):
            written = folder.modified(key)
            if written is not None and time.time() - written > STALE_SECONDS:
                yield key
