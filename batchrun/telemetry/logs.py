"""Log lines on standard error: for a person, or one JSON object per line for a log collector."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TextIO

from batchrun.errors import StorageError
from batchrun.telemetry.printable import printable
from batchrun.telemetry.redact import Redactor

if TYPE_CHECKING:
    from batchrun.telemetry.progress import Progress
    from batchrun.telemetry.rates import Rates

log = logging.getLogger("batchrun")


class _StandardError(logging.StreamHandler[TextIO]):
    """Looks standard error up anew for each line: a live view puts itself between while it is open."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> TextIO:  # type: ignore[override]
        return sys.stderr


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        values: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_text:
            values["traceback"] = record.exc_text
        # In ASCII: whoever shows the line on a terminal shows no control character.
        return json.dumps(values)


class _ToldOnce(logging.Filter):
    """Why a store cannot be written to is told once, whatever else is not written for the same cause."""

    def __init__(self) -> None:
        super().__init__()
        self._told: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        cause = next((value.what for value in record.args or () if isinstance(value, StorageError)), None)
        if cause in self._told:
            return False
        if cause is not None:
            self._told.add(cause)
        return True


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        # Of another library's warning one has to be told whose it is.
        name = "" if record.name.partition(".")[0] == log.name else f" {record.name}"
        record.source = f"{record.levelname.lower()}{name}"
        return printable(super().format(record), newlines=True)


def configure(log_format: str, redact: Redactor) -> None:
    """Sends warnings of all libraries to standard error, through `redact`; replaces what was configured before."""
    handler = _StandardError()
    plain = _Text("%(source)s: %(message)s")
    handler.setFormatter(_Json() if log_format == "json" else plain)
    handler.addFilter(_ToldOnce())
    # The last one: it leaves no arguments.
    handler.addFilter(redact.filter_record)
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    if log_format == "json":
        log.setLevel(logging.INFO)


def progress_event(now: Progress, rates: Rates) -> None:
    """One log line of a run's progress, its numbers as fields of their own."""
    remaining = rates.remaining()
    values = {
        "event": "progress",
        "seconds": round(now.seconds, 1),
        "rows": now.rows,
        "rows_done": now.rows_done,
        "rows_failed": now.counts.failed,
        "partitions": now.partitions,
        "partitions_done": now.partitions_done,
        "rows_per_second": round(rates.per_second("rows"), 2),
        "prompt_tokens_per_second": round(rates.per_second("prompt_tokens"), 1),
        "output_tokens_per_second": round(rates.per_second("output_tokens"), 1),
        "seconds_left": None if remaining is None else round(remaining, 1),
        "workers": now.workers,
        "errors": dict(now.counts.errors),
    }
    log.info("%s of %s rows", now.rows_done, now.rows, extra={"fields": values})
