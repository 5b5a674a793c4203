"""A run on the screen while it goes on: a view that redraws itself on a terminal, lines of text or JSON elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchrun.report.summary import size
from batchrun.telemetry import logs
from batchrun.telemetry.printable import printable
from batchrun.telemetry.progress import Progress, Rates, Watch, duration, line, log_lines

SHOWN_WORKERS = 8


@contextmanager
def show(
    console: Console, log_format: str = "text", price_per_gpu_hour: float | None = None
) -> Iterator[Watch]:
    """Yields a watch for the run: a live view where `console` is a terminal, else a line every quarter minute."""
    if log_format == "json":
        yield log_lines(logs.progress_event)
    elif not console.is_terminal:
        yield log_lines(lambda now, rates: print(line(now, rates), file=sys.stderr, flush=True))
    else:
        rates = Rates()
        # Redrawn when there is something new, once a second: a thread that redraws on its own costs more.
        with Live(Text("starting"), console=console, auto_refresh=False, transient=True) as live:

            def redraw(now: Progress) -> None:
                rates.add(now)
                live.update(view(now, rates, price_per_gpu_hour), refresh=True)

            yield redraw


def view(now: Progress, rates: Rates, price_per_gpu_hour: float | None) -> RenderableType:
    """All that a person wants to know of a run at one moment; each line wraps by itself in a narrow window."""
    remaining = rates.remaining()
    share = now.rows_done / now.rows if now.rows else 1.0
    left = "" if remaining is None else f", {duration(remaining)} left"
    head = Text(f"{share:.0%} after {duration(now.seconds)}{left}", style="bold")
    bar = Table.grid()  # a bar alone ends no line
    bar.add_row(ProgressBar(total=1.0, completed=share, width=60))
    facts = Table.grid(padding=(0, 2))
    facts.add_column(style="dim", no_wrap=True)
    facts.add_column(overflow="fold")
    for name, value in chain(_facts(now, rates, price_per_gpu_hour, remaining), _workers(now, rates)):
        facts.add_row(name, Text(printable(value), style="red" if name == "errors" else ""))
    return Group(head, bar, facts)


def _facts(
    now: Progress, rates: Rates, price: float | None, remaining: float | None
) -> Iterator[tuple[str, str]]:
    before = f", {now.reused:,} from before" if now.reused else ""
    yield "rows", f"{now.rows_done:,} of {now.rows:,}, {rates.per_second('new_rows'):,.0f}/s{before}"
    yield "parts", f"{now.partitions_done:,} of {now.partitions:,}, {now.partitions_flying:,} at work"
    tokens = f"{rates.per_second('prompt_tokens'):,.0f}/s in, {rates.per_second('output_tokens'):,.0f}/s out"
    yield "tokens", tokens
    fill = rates.ratio("real_tokens", "computed_tokens")
    batches = [] if fill is None else [f"padding efficiency {fill:.3f}"]
    if now.pool_fill is not None:
        batches.append(f"pool {now.pool_fill:.0%} full")
    if batches:
        yield "batches", ", ".join([*batches, f"{now.waiting:,} rows in engines"])
    if now.rows_failed:
        kinds = ", ".join(f"{code} {count:,}" for code, count in sorted(now.errors.items()))
        yield "errors", f"{now.rows_failed:,} rows: {kinds}"
    if price is not None:
        spent = price * now.worker_seconds / 3600
        in_all = (
            ""
            if remaining is None
            else f", about {spent + price * now.workers * remaining / 3600:,.2f} in all"
        )
        yield "money", f"{spent:,.2f} so far{in_all}"
    if now.dashboard:
        yield "Dask", now.dashboard
    if not now.workers:
        yield "workers", "waiting for a worker"


def _workers(now: Progress, rates: Rates) -> Iterator[tuple[str, str]]:
    for worker in now.crew[:SHOWN_WORKERS]:
        facts = [f"{worker.tasks} of {worker.slots} tasks"]
        if worker.engine is None:
            facts.append("no engine yet")
        else:
            held = worker.engine.requests - worker.engine.completions
            facts += [f"{rates.of_worker(worker.address):,.0f} tokens/s", f"{held:,} rows in hand"]
        facts.append(size(worker.memory))
        if worker.gpu:
            busy = "" if worker.gpu.use is None else f"{worker.gpu.use:.0%} busy, "
            facts.append(f"GPU {busy}{worker.gpu.memory_used / worker.gpu.memory_total:.0%} full")
        yield worker.address.partition("://")[2], ", ".join(facts)
    if len(now.crew) > SHOWN_WORKERS:
        yield "", f"and {len(now.crew) - SHOWN_WORKERS:,} more"
