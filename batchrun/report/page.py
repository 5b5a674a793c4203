"""The report of an output as one HTML page, from the store alone: no script, no network, opens from a mail."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import jinja2
import yaml

from batchrun.dataset.plan import Plan
from batchrun.job.job import Job
from batchrun.output import lease, manifest, state
from batchrun.output.identity import Identity
from batchrun.output.layout import Layout
from batchrun.output.output import open_output
from batchrun.report import answers, charts
from batchrun.report.answers import Look
from batchrun.report.summary import size
from batchrun.storage import Folder
from batchrun.telemetry import record
from batchrun.telemetry.progress import duration
from batchrun.telemetry.record import REPORT, RunRecord
from batchrun.telemetry.redact import Redactor

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
        folder, pinned, plan, layout = open_output(job)
        found = state.scan(folder, layout)
        written = manifest.read(folder)
        if written is not None and not written.describes(found):
            written = None
        sizes = found.part_bytes.tolist()
        parts = [i for i in range(layout.partitions) if sizes[i]]
        look = answers.look(folder, job, [layout.part(i) for i in parts], [sizes[i] for i in parts])
        runs = record.settle(record.read_all(folder), lease.read(folder))
        return cls(folder, job, pinned, plan, layout, found, written, runs, look)

    @cached_property
    def rows_committed(self) -> int:
        return sum(p.rows for p in self.plan.partitions if self.found.part_bytes[p.index])

    @property
    def errors(self) -> dict[str, int]:
        """Failed rows by code: of the whole output once it is complete, until then as the runs counted them."""
        return record.errors(self.runs) if self.written is None else self.written.errors

    @property
    def tokens(self) -> tuple[int, int]:
        """Prompt and output tokens, likewise."""
        if self.written is not None:
            return self.written.prompt_tokens, self.written.output_tokens
        return sum(run.prompt_tokens for run in self.runs), sum(run.output_tokens for run in self.runs)

    @property
    def cost(self) -> float | None:
        """Of all runs, None where none of them had a price."""
        costs = [run.cost for run in self.runs if run.cost is not None]
        return sum(costs) if costs else None


def write(job: Job, redact: Redactor) -> None:
    """Puts the report beside the job's other files."""
    facts = Facts.read(job)
    facts.folder.put(REPORT, redact(render(facts)).encode(errors="replace"))


def render(facts: Facts) -> str:
    """The page. Everything that comes from data or from a job is text in it, never markup."""
    last = facts.runs[-1] if facts.runs else None
    return _TEMPLATE.render(
        facts=facts,
        last=last,
        outcome=_outcome(facts),
        cards=list(_cards(facts)),
        plots=list(_plots(facts.look, last)),
        errors=sorted(facts.errors.items(), key=lambda item: -item[1]),
        settings=yaml.safe_dump(
            last.job if last else facts.pinned.settings, sort_keys=False, allow_unicode=True
        ),
        runs=facts.runs[-SHOWN_RUNS:],
    )


def _outcome(facts: Facts) -> str:
    if facts.written is not None:
        return "complete with failed rows" if facts.written.failed else "complete"
    return facts.runs[-1].outcome if facts.runs else "begun"


def _cards(facts: Facts) -> Iterator[tuple[str, str, str]]:
    """Title, figure, and what stands under it in small."""
    failed = sum(facts.errors.values())
    prompt, output = facts.tokens
    seconds = sum(run.seconds for run in facts.runs)
    share = facts.rows_committed / facts.plan.rows if facts.plan.rows else 1.0
    yield "rows committed", f"{facts.rows_committed:,}", f"{share:.0%} of {facts.plan.rows:,}"
    yield "failed rows", f"{failed:,}", f"{failed / max(1, facts.rows_committed):.2%}" if failed else "none"
    yield "prompt tokens", _short(prompt), f"{prompt / max(1, facts.rows_committed):,.0f} per row"
    yield "output tokens", _short(output), f"{output / max(1, facts.rows_committed):,.0f} per row"
    if not facts.runs:
        return
    runs = "1 run" if len(facts.runs) == 1 else f"{len(facts.runs)} runs"
    yield "time", duration(seconds), runs
    generated = sum(run.prompt_tokens + run.output_tokens for run in facts.runs)
    written = sum(run.output_tokens for run in facts.runs)
    yield (
        "tokens per second",
        _short(generated / max(seconds, 1e-9)),
        f"{_short(written / max(seconds, 1e-9))} of them output",
    )
    worker_seconds = sum(run.worker_seconds for run in facts.runs)
    yield "worker time", duration(worker_seconds), f"at most {max(run.workers for run in facts.runs)} at once"
    computed = sum(run.computed_tokens for run in facts.runs)
    if computed:
        real = sum(run.real_tokens for run in facts.runs)
        yield "padding efficiency", f"{real / computed:.1%}", "computed tokens that were no padding"
    cost = facts.cost
    if cost is not None:
        price = [run.price_per_gpu_hour for run in facts.runs if run.price_per_gpu_hour is not None][-1]
        yield "money", f"{cost:,.2f}", f"at {price:,.2f} per GPU and hour"
        if generated:
            yield (
                "per million tokens",
                f"{cost / generated * 1e6:,.3f}",
                f"{cost / max(1, written) * 1e6:,.3f} per million output",
            )


def _plots(look: Look, run: RunRecord | None) -> Iterator[tuple[str, str]]:
    """Title and SVG, as far as there is anything to draw."""
    if run and len(run.samples.get("seconds", [])) > 2:
        samples = run.samples
        seconds = samples["seconds"]

        def per_second(name: str) -> list[float | None]:
            return charts.rates(seconds, samples[name])

        tokens = {"prompt tokens": per_second("prompt_tokens"), "output tokens": per_second("output_tokens")}
        yield "Tokens per second", charts.over_time(seconds, tokens)
        yield "Rows per second", charts.over_time(seconds, {"rows": per_second("rows")})
        fill = {"not padding": charts.rates(seconds, samples["real_tokens"], samples["computed_tokens"])}
        if _any(samples["pool_fill"]):
            fill["key/value pages in use"] = samples["pool_fill"]
        yield "Batch fill", charts.over_time(seconds, fill, share=True)
        yield "Rows held by engines", charts.over_time(seconds, {"waiting or generating": samples["waiting"]})
        if _any(samples["gpu_use"]) or _any(samples["gpu_memory"]):
            gpu = {"busy": samples["gpu_use"], "memory": samples["gpu_memory"]}
            yield "GPU, mean of all", charts.over_time(seconds, gpu, share=True)
        if len(set(samples["workers"])) > 1:
            yield "Workers", charts.over_time(seconds, {"workers": samples["workers"]})
    if len(look.prompt_tokens):
        yield "Prompt lengths", charts.histogram(look.prompt_tokens, "tokens in a prompt")
        yield "Answer lengths", charts.histogram(look.output_tokens, "tokens in an answer")


def _any(values: list[float | None]) -> bool:
    return any(value is not None for value in values)


def _short(number: float) -> str:
    for factor, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e4, "k")):
        if number >= factor:
            return f"{number / (1e3 if unit == 'k' else factor):.4g} {unit}"
    return f"{number:,.0f}"


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("batchrun.report", "."),
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    undefined=jinja2.StrictUndefined,
)
_ENVIRONMENT.filters |= {"duration": duration, "size": size, "short": _short}
_TEMPLATE = _ENVIRONMENT.get_template("page.html.jinja")
