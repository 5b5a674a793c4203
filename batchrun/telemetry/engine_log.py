"""What engines printed before they ended: one small text object for each that did, beside the runs' records."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence

from batchrun.errors import StorageError
from batchrun.storage import Folder
from batchrun.telemetry.record import RUNS
from batchrun.telemetry.redact import Redactor

log = logging.getLogger(__name__)

# Logs of one run: the first ones tell the most, and an engine that always fails ends the run.
MOST = 20


def save(folder: Folder, run: str, title: str, lines: Sequence[str], redact: Redactor) -> str:
    """Puts `title` and the lines under the run's next free key; the key, empty where none is left or the store fails.

    Several workers may do so at once.
    """
    try:
        taken = keys(folder, run)
        for number in range(len(taken) + 1, MOST + 1):
            key = f"{_prefix(run)}{number}.log"
            text = redact("\n".join([title, "", *lines, ""]))
            if key not in taken and folder.put_if_absent(key, text.encode(errors="replace")):
                return key
    except StorageError as error:
        log.warning("the engine's output could not be saved: %s", error)
    return ""


def keys(folder: Folder, run: str) -> list[str]:
    """The logs of the run's engines, in the order in which they ended: `_job/runs/1f0c9a3e-engine-1.log`, ..."""
    prefix = _prefix(run)
    found = [key for key in folder.list(prefix) if re.fullmatch(r"\d+\.log", key.removeprefix(prefix))]
    return sorted(found, key=lambda key: int(key.removeprefix(prefix).removesuffix(".log")))


def _prefix(run: str) -> str:
    return f"{RUNS}{run[:8]}-engine-"
