"""Batch offline inference over Parquet: one job file in, a complete dataset of answers out, exactly once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from batchrun.version import __version__

if TYPE_CHECKING:
    from batchrun.driver.retry import retry
    from batchrun.driver.run import run
    from batchrun.job.job import Job
    from batchrun.report.result import RunResult

__all__ = ["Job", "RunResult", "__version__", "retry", "run"]

_HOMES = {
    "run": "batchrun.driver.run",
    "retry": "batchrun.driver.retry",
    "Job": "batchrun.job.job",
    "RunResult": "batchrun.report.result",
}


def __getattr__(name: str) -> Any:
    # Dask and torch take seconds to import; `import batchrun` and a refused job file should not wait for them.
    if name in _HOMES:
        import importlib

        return getattr(importlib.import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'batchrun' has no attribute {name!r}")
