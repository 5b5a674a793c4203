"""The report of an output as one HTML page, from the store alone: no script, no network, opens from a mail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import jinja2
import yaml

from batchrun.counters import Counters
from batchrun.dataset.plan import Plan
from batchrun.job.job import Job
from batchrun.output import lease, manifest, state
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.output.output import Output
from batchrun.report import answers, bill, plots
from batchrun.report.answers import Look
from batchrun.report.summary import money, number
from batchrun.storage import Folder
from batchrun.telemetry import record
from batchrun.telemetry.printable import counted
from batchrun.telemetry.progress import duration
from batchrun.telemetry.record import REPORT, RunRecord
from batchrun.telemetry.redact import Redactor
from batchrun.units import size

SHOWN_RUNS = 50


@dataclass(frozen=True)
class Facts:
    """What the page tells, as the store has it now."""

    folder: Folder
    job: Job
    pinned: Identity
    plan: Plan
    layout: Layout
    found: state.State
    written: manifest.Manifest | None
    runs: list[RunRecord]
    look: Look

    @classmethod
    def read(cls, job: Job) -> Facts:
        """Raises OutputError where nothing was ever run, or files are damaged."""
        output = Output.open(job)
        folder, layout = output.folder, output.layout
        found = output.scan()
        written = manifest.read(folder)
        if written is not None and not written.describes(found):
            written = None
        sizes = found.part_bytes.tolist()
        parts = [i for i in range(layout.partitions) if sizes[i]]
        look = answers.look(folder, job, [layout.part(i) for i in parts], [sizes[i] for i in parts])
        runs = record.settle(record.read_all(folder), lease.read(folder))
        return cls(folder, job, output.identity, output.plan, layout, found, written, runs, look)

    @cached_property
    def rows_committed(self) -> int:
        """Rows of the parts that are there."""
        return sum(p.rows for p in self.plan.partitions if self.found.part_bytes[p.index])

    @cached_property
    def counts(self) -> Counters:
        """What all runs came to: of rows that were generated twice, both."""
        return record.total(self.runs)

    @property
    def errors(self) -> dict[str, int]:
        """Failed rows by code: of the whole output once it is complete, until then as the runs counted them."""
        return self.counts.errors if self.written is None else self.written.errors

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and output tokens, likewise."""
        whole = self.counts if self.written is None else self.written
        return whole.prompt_tokens, whole.output_tokens

    @property
    def endings(self) -> tuple[dict[str, int], int]:
        """Rows by finish reason, and those with an empty answer, likewise."""
        whole = self.counts if self.written is None else self.written
        return whole.finish_reasons, whole.empty


def write(job: Job, redact: Redactor) -> None:
    """Puts the report beside the job's other files."""
    facts = Facts.read(job)
    facts.folder.put(REPORT, redact(render(facts)).encode(errors="replace"))


def render(facts: Facts) -> str:
    """The page. Everything that comes from data or from a job is text in it, never markup."""
    last = facts.runs[-1] if facts.runs else None
    reasons, empty = facts.endings
    return _TEMPLATE.render(
        facts=facts,
        last=last,
        outcome=_outcome(facts),
        ran_on=list(_ran_on(facts.job, facts.runs)),
        cards=list(_cards(facts)),
        bill=list(bill.lines(facts.runs)),
        plots=list(plots.plots(facts.look, facts.runs)),
        endings=list(_endings(reasons, empty)),
        errors=sorted(facts.errors.items(), key=lambda item: -item[1]),
        settings=yaml.safe_dump(
            last.job if last else facts.pinned.settings, sort_keys=False, allow_unicode=True
        ),
        runs=facts.runs[-SHOWN_RUNS:],
    )


def _ran_on(job: Job, runs: list[RunRecord]) -> Iterator[tuple[str, str]]:
    """Model, engine, machine and price, of the last run that had them."""
    yield "model", job.model.title
    loaded = [run for run in runs if run.engine]
    if loaded:
        run = loaded[-1]
        how = ", ".join(word for word in (run.attention and f"{run.attention} attention", run.dtype) if word)
        yield "engine", f"{run.engine}{f' ({how})' if how else ''}"
        count = counted(run.workers, "worker")
        cores = f"{run.machine['cores']} CPU cores" if run.machine.get("cores") else "a CPU"
        if run.agreement is not None:
            yield "accuracy", str(run.agreement)
        yield "machine", f"{count}{run.group} on {cores if run.device in ('', 'cpu') else run.device}"
    prices = [run.price_per_gpu_hour for run in runs if run.price_per_gpu_hour is not None]
    if prices:
        on_gpus = any(run.device not in ("", "cpu") or run.gpus_per_worker > 1 for run in loaded)
        yield "price", f"{prices[-1]:,.2f} per {'GPU' if on_gpus else 'worker'} and hour"


def _endings(reasons: dict[str, int], empty: int) -> Iterator[tuple[str, int, float]]:
    """How answers ended: what to call it, rows, their share."""
    rows = sum(reasons.values())
    for reason, count in sorted(reasons.items(), key=lambda item: -item[1]):
        yield REASONS.get(reason, reason), count, count / rows
    if empty:
        yield "empty answer, whichever way it ended", empty, empty / rows


REASONS = {
    "stop": "stop: ended by itself",
    "length": "length: cut at generation.max_new_tokens",
    "error": "error: no answer",
}


def _outcome(facts: Facts) -> str:
    if facts.written is not None:
        return "complete with failed rows" if facts.written.failed else "complete"
    return facts.runs[-1].outcome if facts.runs else "begun"


def _cards(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """Title, figure, and what stands under it in small."""
    failed = sum(facts.errors.values())
    prompt, output = facts.tokens
    rows = facts.rows_committed
    share = rows / facts.plan.rows if facts.plan.rows else 1.0
    yield "rows committed", f"{rows:,}", f"{share:.0%} of {facts.plan.rows:,}"
    # The manifest's are the output's, of samples in rows of their own; those of runs are the input's.
    samples = facts.job.output.rows_of_row if facts.written is not None else 1
    what = "failed rows" if samples == 1 else f"failed rows, {samples} for each of the input's"
    yield what, f"{failed:,}", f"{failed / max(1, rows * samples):.2%}" if failed else "none"
    yield "prompt tokens", f"{prompt:,}", f"{prompt / max(1, rows):,.0f} per row"
    yield "output tokens", f"{output:,}", f"{output / max(1, rows):,.0f} per row"
    if not facts.runs:
        return
    seconds = sum(run.seconds for run in facts.runs)
    runs = "1 run" if len(facts.runs) == 1 else f"{len(facts.runs)} runs"
    yield "time", duration(seconds), runs
    written = facts.counts.output_tokens
    rate = number(facts.counts.tokens / max(seconds, 1e-9))
    each = ""
    if any(run.gpus > 1 for run in facts.runs) and (spent := sum(run.gpu_seconds for run in facts.runs)):
        each = f", {number(facts.counts.tokens / spent)} per GPU"
    yield "tokens per second", rate, f"{number(written / max(seconds, 1e-9))} of them output{each}"
    computed = sum(run.computed_tokens for run in facts.runs)
    if computed:
        real = sum(run.real_tokens for run in facts.runs)
        yield "padding efficiency", f"{real / computed:.1%}", "of computed tokens are no padding"
    shared = sum(run.shared_tokens for run in facts.runs)
    if shared:
        # Of several samples each is a prompt to the engine, which counts of its own what it was run on.
        run_on = sum(run.real_tokens for run in facts.runs) - written
        share = shared / (shared + max(0, run_on))
        yield "shared prompt tokens", f"{shared:,}", f"{share:.0%}, computed once for several rows"
    if facts.counts.copied:
        tokens = f"{facts.counts.copied_tokens:,} tokens"
        yield "copied rows", f"{facts.counts.copied:,}", f"{tokens}, from rows with the same prompt"
    costs = [run.cost for run in facts.runs if run.cost is not None]
    if costs:
        yield "cost", money(sum(costs)), "all runs"


def _short(value: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if value >= factor:
            return f"{value / (1e3 if unit == 'k' else factor):.4g} {unit}"
    return number(value)


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("batchrun.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters |= {
    "duration": duration,
    "size": size,
    "counted": counted,
    "short": _short,
    "money": money,
}
_TEMPLATE = _ENVIRONMENT.get_template("page.html.jinja")
