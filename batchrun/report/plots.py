"""The report's plots: over the time of all runs, one after the other, and the lengths of prompts and answers."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from batchrun.report import charts
from batchrun.report.answers import Look
from batchrun.report.charts import Values
from batchrun.telemetry.record import RunRecord

# Samples; fewer tell nothing of a run's course.
SAMPLES = 3


def plots(look: Look, runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    """Title and SVG, as far as there is anything to draw."""
    shown = [run for run in runs if len(run.samples.get("seconds", [])) >= SAMPLES]
    if shown:
        yield from _over_time(shown)
    if len(look.prompt_tokens):
        yield "Prompt lengths", charts.histogram(look.prompt_tokens, "tokens in a prompt")
        yield "Answer lengths", charts.histogram(look.output_tokens, "tokens in an answer")


def _over_time(runs: Sequence[RunRecord]) -> Iterator[tuple[str, str]]:
    starts = [0.0]
    for run in runs:
        starts.append(starts[-1] + max(run.seconds, run.samples["seconds"][-1] or 0.0))

    def joined(values_of: Callable[[RunRecord], Values]) -> list[float | None]:
        """The values of all runs, with a gap between two of them."""
        values: list[float | None] = []
        for run in runs:
            values += [*values_of(run), math.nan]
        return values[:-1]

    offsets = {run.key: start for run, start in zip(runs, starts, strict=False)}
    seconds = joined(lambda run: [offsets[run.key] + (at or 0.0) for at in run.samples["seconds"]])

    def gauge(name: str) -> list[float | None]:
        return joined(lambda run: run.samples[name])

    def per_second(name: str) -> list[float | None]:
        return joined(lambda run: charts.rates(run.samples["seconds"], run.samples[name]))

    def draw(lines: dict[str, list[float | None]], share: bool = False) -> str:
        return charts.over_time(seconds, lines, share, starts[1:-1])

    tokens = {"prompt tokens": per_second("prompt_tokens"), "output tokens": per_second("output_tokens")}
    yield "Tokens per second", draw(tokens)
    yield "Rows per second", draw({"rows": per_second("rows")})
    fill = {"not padding": joined(_fill), "key/value pages in use": gauge("pool_fill")}
    if told := {name: values for name, values in fill.items() if _any(values)}:
        yield "Batch fill", draw(told, share=True)
    yield "Rows held by engines", draw({"waiting or generating": gauge("waiting")})
    gpu = {"busy": gauge("gpu_use"), "memory": gauge("gpu_memory")}
    if any(map(_any, gpu.values())):
        yield "GPU, mean of all", draw(gpu, share=True)
    if len({count for run in runs for count in run.samples["workers"]}) > 1:
        yield "Workers", draw({"workers": gauge("workers")})


def _fill(run: RunRecord) -> list[float | None]:
    """Share of the computed tokens that are no padding, over time; rates of two counters may be a moment apart."""
    samples = run.samples
    shares = charts.rates(samples["seconds"], samples["real_tokens"], samples["computed_tokens"])
    return [None if share is None else min(share, 1.0) for share in shares]


def _any(values: Values) -> bool:
    return any(value is not None and not math.isnan(value) for value in values)
