"""A run's progress bar in a notebook."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

from batchrun.telemetry.progress import Progress, ProgressCallback, duration
from batchrun.telemetry.rates import Rates


def in_notebook() -> bool:
    """Whether this is a Jupyter kernel, whose user sees no terminal."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in getattr(shell, "config", {})


@contextmanager
def bar(wanted: bool, title: str, watch: ProgressCallback) -> Iterator[ProgressCallback]:
    """Yields a watch that passes everything on to `watch`, and in a notebook shows a bar if one is wanted."""
    if not (wanted and in_notebook()):
        yield watch
        return
    # transformers brings it.
    from tqdm.auto import tqdm

    rates = Rates()
    with tqdm(desc=title, unit=" rows", bar_format="{desc} {percentage:3.0f}%|{bar}| {postfix}") as shown:

        def see(now: Progress) -> None:
            rates.add(now)
            shown.total = now.rows
            shown.n = now.rows_done
            remaining = rates.remaining()
            left = "" if remaining is None else f", about {duration(remaining)} left"
            failed = f", {now.counts.failed:,} failed" if now.counts.failed else ""
            facts = f"{now.rows_done:,} of {now.rows:,} rows{failed}, {duration(now.seconds)}{left}"
            shown.set_postfix_str(facts, refresh=False)
            shown.refresh()
            watch(now)

        yield see
