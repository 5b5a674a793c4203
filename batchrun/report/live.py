"""A run on the screen while it goes on: a view that redraws itself on a terminal, lines of text or JSON elsewhere."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from itertools import chain

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from batchrun.counters import Counters
from batchrun.job.job import Job
from batchrun.report.summary import CUT, money, number
from batchrun.telemetry import logs
from batchrun.telemetry.printable import counted, printable
from batchrun.telemetry.progress import Progress, ProgressCallback, WorkerView, duration
from batchrun.telemetry.rates import Rates, line, log_lines
from batchrun.units import size

SHOWN_WORKERS = 8
UNKNOWN = "–"


@contextmanager
def show(console: Console, log_format: str, job: Job) -> Iterator[ProgressCallback]:
    """Yields a callback for the run: a live view where `console` is a terminal, else a line every quarter minute."""
    if log_format == "json":
        yield log_lines(logs.progress_event)
    elif not console.is_terminal:
        yield log_lines(lambda now, rates: print(line(now, rates), file=sys.stderr, flush=True))
    else:
        view = View(job)
        # Redrawn when there is something new, once a second: a thread that redraws on its own costs more.
        live = Live(view.render(None), console=console, auto_refresh=False, transient=True)
        # A terminal that is gone is no error of the run, and must not take the place of one.
        with suppress(OSError):
            live.start(refresh=True)
        try:
            yield lambda now: live.update(view.render(now), refresh=True)
        finally:
            with suppress(OSError):
                live.stop()


class View:
    """All that a person wants to know of a run at one moment.

    Every fact has its line from the first moment on, and a line that is too long is cut: nothing on the screen moves.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.rates = Rates()
        # Lines for them, as many as there ever were.
        self._workers = 1

    def render(self, now: Progress | None) -> RenderableType:
        """The view of the run now; None stands for the time before its first look."""
        if now is not None:
            self.rates.add(now)
        share = 0.0 if now is None else now.rows_done / now.rows if now.rows else 1.0
        head = Text.assemble(
            (self.job.title, "bold"), f" · {self.job.model.title}", no_wrap=True, overflow="ellipsis"
        )
        bar = Table.grid(expand=True, padding=(0, 1))
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True, justify="right")
        bar.add_row(ProgressBar(total=1.0, completed=share), f"{share:.0%}")
        # As wide as the terminal, so that what does not fit ends in an ellipsis: half a number would be read as one.
        facts = Table.grid(padding=(0, 2), expand=True)
        facts.add_column(style="dim", no_wrap=True, min_width=9)
        facts.add_column(no_wrap=True, overflow="ellipsis", ratio=1)
        for name, value in chain(self._facts(now), self._crew(now)):
            failing = name == "failed" and now is not None and now.counts.failed
            facts.add_row(
                name,
                Text(printable(value), style="red" if failing else "", no_wrap=True, overflow="ellipsis"),
            )
        # The last line, where the cursor stands, has room for the ^C that a terminal echoes: behind a full one it would
        # take a line of its own, and the view's first line would stay on the screen.
        return Group(head, bar, facts, Text())

    def _facts(self, now: Progress | None) -> Iterator[tuple[str, str]]:
        price = self.job.cluster.price_per_gpu_hour
        if now is None:
            yield "time", "starting: reading the input, checking the model, starting workers"
            for name in (
                "rows",
                "tokens",
                "answers",
                "batches",
                "failed",
                *(["cost"] if price is not None else []),
            ):
                yield name, UNKNOWN
            return
        counts, rates = now.counts, self.rates
        remaining = rates.remaining()
        left = "" if remaining is None else f", about {duration(remaining)} left"
        yield "time", f"{duration(now.seconds)}{left}"
        parts = f"{now.partitions_done:,} of {counted(now.partitions, 'part')}"
        rows = f"{now.rows_done:,} of {now.rows:,}, {number(rates.per_second('rows'))}/s; {parts}"
        rows += f"; {counts.reused:,} from before" if counts.reused else ""
        rows += f"; {counts.copied:,} copied" if counts.copied else ""
        yield "rows", rows
        speed_in, speed_out = (number(rates.per_second(f"{which}_tokens")) for which in ("prompt", "output"))
        sums = f"{counts.prompt_tokens:,} in, {counts.output_tokens:,} out so far"
        sums += f", {now.shared_tokens:,} shared" if now.shared_tokens else ""
        yield "tokens", f"{speed_in}/s in, {speed_out}/s out; {sums}"
        yield "answers", _endings(counts.finish_reasons)
        yield "batches", _batches(now)
        kinds = ", ".join(f"{code} {count:,}" for code, count in sorted(counts.errors.items()))
        yield "failed", f"{counted(counts.failed, 'row')}: {kinds}" if counts.failed else "none"
        if price is not None:
            spent, whole = rates.cost(price)
            yield "cost", f"{money(spent)} so far{'' if whole is None else f', about {money(whole)} in all'}"
        if now.dashboard:
            yield "Dask", now.dashboard

    def _crew(self, now: Progress | None) -> Iterator[tuple[str, str]]:
        worker_views = [] if now is None else now.worker_views
        lines = [
            (f"worker {i}", self._worker(view)) for i, view in enumerate(worker_views[:SHOWN_WORKERS], 1)
        ]
        if not worker_views:
            lines.append(("workers", "starting" if now is None else "waiting for a worker"))
        if len(worker_views) > SHOWN_WORKERS:
            lines.append(
                (
                    "",
                    f"and {len(worker_views) - SHOWN_WORKERS:,} more: {_doing(worker_views[SHOWN_WORKERS:])}",
                )
            )
        self._workers = max(self._workers, len(lines))
        yield from lines
        yield from [("", "")] * (self._workers - len(lines))

    def _worker(self, worker: WorkerView) -> str:
        facts = [DOING[worker.doing]]
        if worker.engine is not None and worker.doing == "generating":
            held = worker.engine.requests - worker.engine.completions
            facts += [
                f"{number(self.rates.of_worker(worker.address))} tokens/s",
                f"{counted(held, _held(worker.counts))} in hand",
            ]
        facts.append(size(worker.memory))
        if worker.gpu:
            busy = "" if worker.gpu.use is None else f"{worker.gpu.use:.0%} busy, "
            what = "GPU" if worker.gpu.count == 1 else f"{worker.gpu.count} GPUs"
            facts.append(f"{what} {busy}{worker.gpu.memory_used / worker.gpu.memory_total:.0%} full")
        facts.append(worker.address.partition("://")[2])
        return ", ".join(facts)


DOING = {"loading": "loading the model", "compiling": "compiling the model"} | {
    name: name for name in ("starting", "generating", "sealing", "idle")
}
"""What a worker does (see `WorkerView`), to a person."""


def _endings(finish_reasons: Mapping[str, int]) -> str:
    """How the answers ended that there are: by themselves, or cut."""
    stopped, cut = (finish_reasons.get(reason, 0) for reason in ("stop", "length"))
    if not stopped + cut:
        return UNKNOWN
    return f"{stopped:,} ended by themselves, {cut:,} ({cut / (stopped + cut):.1%}) {CUT}"


def _batches(now: Progress) -> str:
    fill = now.padding_efficiency
    facts = [] if fill is None else [f"padding efficiency {fill:.3f}"]
    if now.pool_fill is not None:
        facts.append(f"pool {now.pool_fill:.0%} full")
    return ", ".join([*facts, f"{counted(now.waiting, _held(now.counts))} in engines"]) if facts else UNKNOWN


def _held(counts: Counters) -> str:
    """What an engine holds one of for each answer that it is asked for."""
    return "sample" if counts.more_samples else "row"


def _doing(worker_views: Sequence[WorkerView]) -> str:
    counts = Counter(view.doing for view in worker_views)
    return ", ".join(f"{count:,} {doing}" for doing, count in counts.most_common())
