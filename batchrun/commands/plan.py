"""What `batchrun plan` answers: how much there is, what a sample of it becomes, how long it takes and what it costs."""

from __future__ import annotations

import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
from rich.bar import Bar
from rich.console import RenderableType
from rich.table import Table

from batchrun.cluster.local import environments, unused_gpus
from batchrun.commands import memory
from batchrun.dataset.plan import Partition, carried_columns
from batchrun.dataset.rows import carried_schema
from batchrun.driver.prepare import Prepared, finished, prepare
from batchrun.engine.weights.packed_format import runs_in_fp8
from batchrun.errors import JobError
from batchrun.estimate.cost import Estimate, Throughput, estimate
from batchrun.estimate.order import orders
from batchrun.estimate.records import device_name, model_key, recall, remember
from batchrun.estimate.sample import ROWS, Sample, interval, sample
from batchrun.job.job import Job
from batchrun.model.adapter import check_adapter
from batchrun.model.files import read_json
from batchrun.output.part import part_schema
from batchrun.telemetry import agreement
from batchrun.telemetry.gpu import local_workers, visible_gpus
from batchrun.telemetry.printable import counted
from batchrun.telemetry.progress import duration
from batchrun.units import size

# Seconds after which a plan makes do with what it has read.
SAMPLE_SECONDS = 4.0
# Share of a trial's time for a sample as large as what an engine looks ahead at.
TRIAL_SAMPLE_SHARE = 0.25
BARS = 12
BAR_WIDTH = 40
# Characters of a rendered prompt.
PROMPT_SHOWN = 400


def preview(
    job: Job,
    trial: float | None = None,
    gpus: int | None = None,
    compare: Literal["fp8"] | None = None,
) -> dict[str, Any]:
    """Plans the job, makes prompts of a sample and tells what the rest of it takes; writes nothing into the output.

    Args:
        trial: seconds for a trial on the real engine, whose throughput is remembered on this machine.
        gpus: to estimate for, in groups of `engine.gpus`; by default those of the job's cluster or of this machine.
        compare: what weights may be converted to: a second trial is made the other way (with it, or without where the
            job has it), and how far the answers agree is remembered on this machine.

    Returns plain values; `estimate` is None where no throughput is known.

    Raises:
        JobError: nothing to compare, or fewer GPUs than an engine takes. Refused: what a run would be refused for.
    """
    if compare is not None and job.answer.is_scored:
        raise JobError("the job generates nothing that could differ", "plan --compare", "leave out --compare")
    if compare is not None and job.model.adapters is not None:
        what = f"{compare} does not go with model.adapters"
        raise JobError(what, "plan --compare", "leave out --compare, or name one of them in model.adapter")
    started = time.monotonic()
    prepared = prepare(job)
    finished(prepared)
    prepared.found.refuse_foreign(prepared.folder)
    if compare is not None and job.engine.cache_dtype == "auto" and _is_in_fp8(prepared):
        what = "the checkpoint's weights are in fp8, so that both ways would be the same"
        raise JobError(what, "plan --compare", "leave out --compare, or compare engine.cache_dtype: fp8")
    workers = _workers(prepared, gpus)
    opening = time.monotonic() - started
    rows = ROWS if trial is None else max(ROWS, job.engine.window_rows)
    sampled = sample(prepared, rows, max(SAMPLE_SECONDS, TRIAL_SAMPLE_SHARE * (trial or 0.0)))
    endings: dict[str, int] = {}
    known = recall(prepared, float(sampled.lengths.mean()) if len(sampled.lengths) else 0.0)
    if trial is not None:
        known, endings = _tried(prepared, sampled, trial, opening)
    left = _left(prepared)
    plan = prepared.plan
    comparison = None
    if compare is not None and trial is not None:
        comparison = _comparison(prepared, sampled, compare, trial, left, workers)
    return {
        "output": prepared.folder.name,
        "files": len(plan.files),
        "rows": plan.rows,
        "rows_left": sum(partition.rows for partition in left),
        "bytes": plan.input_bytes,
        "partitions": len(plan.partitions),
        "largest_partition": max(partition.rows for partition in plan.partitions),
        "columns": _columns(prepared),
        "levels": None if job.answer.format is None else job.answer.format.levels,
        "plan_hash": plan.hash,
        "skipped": [f"{skipped.path} ({skipped.reason})" for skipped in plan.skipped],
        "context": prepared.codec.engine.max_context,
        "max_new_tokens": 0
        if job.answer.is_scored
        else max(sampled.new_tokens, default=job.generation.defaults.max_new_tokens),
        "invalid_if_cut": job.answer.is_constrained and not job.answer.is_scored,
        "cut": _cut(endings),
        "prompt_tokens": _prompt_tokens(sampled, plan.rows),
        "orders": None if (looked := orders(prepared)) is None else looked.to_json(),
        "problems": _problems(sampled, job),
        "prompts": [text[:PROMPT_SHOWN] for text in sampled.texts],
        "adapters": _adapters(prepared),
        "memory": memory.of(job, prepared, sampled),
        "unused_gpus": _unused(prepared, gpus),
        "estimate": None if known is None else _estimate(known, sampled, left, job, workers).to_json(),
        "comparison": comparison,
    }


def lines(found: dict[str, Any]) -> list[RenderableType]:
    """The same for a person."""
    shown: list[RenderableType] = [
        f"{found['rows']:,} rows in {counted(found['files'], 'file')}, {size(found['bytes'])} uncompressed "
        f"-> {counted(found['partitions'], 'partition')} (plan {found['plan_hash'][:8]})",
        f"largest partition {found['largest_partition']:,} rows; output {found['output']}",
    ]
    shown.append(f"columns: {', '.join(f'{name} ({kind})' for name, kind in found['columns'].items())}")
    if found["levels"] is not None:
        shown.append(f"answers: of a recursive schema, nested at most {found['levels']} deep")
    if found["skipped"]:
        left_out = counted(len(found["skipped"]), "unreadable file")
        shown.append(f"{left_out} left out: {', '.join(found['skipped'][:5])}")
    shown += _prompt_lines(found)
    for i, text in enumerate(found["prompts"], 1):
        shown.append(f"prompt {i}: {text}")
    shown += [f"adapter {adapter}" for adapter in found["adapters"]]
    return shown + memory.lines(found["memory"]) + _estimate_lines(found) + _comparison_lines(found)


def _columns(prepared: Prepared) -> dict[str, str]:
    """The output's columns with their types."""
    job, schema = prepared.job, prepared.plan.schema
    names = carried_columns(job.input, schema, job.output.partition_by)
    carried = carried_schema(pa.schema([schema.field(name) for name in names]), job)
    found = part_schema(carried, job.output, job.answer.format)
    return {field.name: str(field.type) for field in found}


def _adapters(prepared: Prepared) -> list[str]:
    """The model's adapters, a line each."""
    settings, model = prepared.job.model, prepared.model
    if model.adapter is not None:
        facts = check_adapter(model.adapter, model)
        return [f"{settings.adapter}: {facts}, merged into the weights"]
    return [
        f"{name}: {check_adapter(folder, model)}, for rows whose {settings.adapter_column} is {name}"
        for name, folder in model.adapters
    ]


def _workers(prepared: Prepared, gpus: int | None) -> int:
    """Engines on so many GPUs, or on those of the job's cluster or of this machine."""
    job, each = prepared.job, prepared.gpus
    if gpus is None:
        if job.cluster.is_local:
            environments(job.cluster, each)
        return local_workers(job.cluster.workers, visible_gpus(), each)
    if gpus < each:
        what = f"one engine takes {each} GPUs (engine.gpus)"
        raise JobError(what, "plan --gpus", f"estimate for {each} or more")
    return gpus // each


def _unused(prepared: Prepared, gpus: int | None) -> int:
    """GPUs that are too few for one more engine."""
    if gpus is not None:
        return gpus % prepared.gpus
    cluster = prepared.job.cluster
    return unused_gpus(cluster, prepared.gpus) if cluster.is_local else 0


def _tried(
    prepared: Prepared, sampled: Sample, seconds: float, opening: float
) -> tuple[Throughput, dict[str, int]]:
    """A trial's throughput, which is remembered on this machine, and how its answers ended."""
    # It imports torch.
    from batchrun.estimate.trial import trial

    known, endings = trial(prepared, sampled, seconds, opening)
    known = replace(known, device=device_name())
    remember(model_key(prepared), prepared.job.engine.kind, prepared.identity.job_hash, known)
    return known, endings


def _is_in_fp8(prepared: Prepared) -> bool:
    """Whether the model's weights run in the fp8 that they are published in."""
    config = read_json(Path(prepared.model.path) / "config.json")
    return runs_in_fp8(config.get("quantization_config") or {})


def _comparison(
    prepared: Prepared,
    sampled: Sample,
    quantization: Literal["fp8"],
    trial: float,
    left: list[Partition],
    workers: int,
) -> dict[str, Any]:
    """The other way's estimate, from a trial of its own, and how far its answers agree with the job's."""
    # It imports torch.
    from batchrun.estimate.comparison import compare

    found = compare(prepared, sampled, quantization, trial)
    agreement.remember(prepared.model.fingerprint, found)
    started = time.monotonic()
    plain = prepared.job.fp8 is not None
    model = prepared.job.model.model_copy(update={"quantization": None if plain else quantization})
    engine = prepared.job.engine.model_copy(update={"cache_dtype": "auto"})
    job = prepared.job.model_copy(update={"model": model, "engine": engine})
    again = prepare(job)
    known, _ = _tried(again, sampled, trial, time.monotonic() - started)
    return {
        "quantization": job.model.quantization,
        "estimate": _estimate(known, sampled, left, job, workers).to_json(),
        "agreement": asdict(found),
    }


def _comparison_lines(found: dict[str, Any]) -> list[RenderableType]:
    comparison = found["comparison"]
    if comparison is None:
        return []
    other = comparison["quantization"]
    how = "without fp8" if other is None else f"with model.quantization: {other}"
    about = agreement.Agreement(**comparison["agreement"])
    shown: list[RenderableType] = [str(about)]
    if found["invalid_if_cut"]:
        shown.append(
            f"valid answers, those that end by themselves: {about.quantized_ended:,} of {about.rows:,} with "
            f"{about.quantization}, {about.ended:,} without"
        )
    return [f"{how}, {_how_long(comparison['estimate'])}", *shown] if found["rows_left"] else shown


def _left(prepared: Prepared) -> list[Partition]:
    """The partitions that have no part yet."""
    committed = prepared.found.committed
    return [partition for partition in prepared.plan.partitions if not committed[partition.index]]


def _estimate(known: Throughput, sampled: Sample, left: list[Partition], job: Job, workers: int) -> Estimate:
    rows = sum(partition.rows for partition in left)
    return estimate(
        known,
        sampled.lengths,
        np.array(sampled.runs, np.int64),
        rows * len(sampled.prompts) / max(1, sampled.rows),
        0 if job.answer.is_scored else job.generation.samples * float(np.mean(sampled.new_tokens or [0])),
        workers,
        len(left),
        job.cluster.price_per_gpu_hour,
    )


def _prompt_tokens(sampled: Sample, rows: int) -> dict[str, Any]:
    """Percentiles of the sampled prompts' lengths in tokens, their histogram, and what all rows add up to."""
    lengths = sampled.lengths
    if not len(lengths):
        return {}
    edges = np.unique(np.geomspace(max(1, lengths.min()), lengths.max() + 1, BARS + 1).astype(int))
    counts = np.histogram(lengths, edges)[0] if len(edges) > 1 else np.array([len(lengths)])
    return {
        "rows": sampled.rows,
        **{f"p{q}": int(np.percentile(lengths, q)) for q in (10, 50, 90, 99)},
        "max": int(lengths.max()),
        "mean": round(float(lengths.mean()), 1),
        "estimated_total": round(float(lengths.sum()) / sampled.rows * rows),
        "histogram": [
            {"from": int(low), "to": int(high) - 1, "rows": int(count)}
            for low, high, count in zip(edges[:-1], edges[1:], counts, strict=False)
        ],
        "shared_prefix": round(sampled.shared_prefix, 4),
        "duplicates": sampled.duplicates,
    }


def _cut(endings: dict[str, int]) -> dict[str, Any] | None:
    """Of the answers that a trial generated, those that were cut, with the 95% interval of their share."""
    tried = sum(endings.values())
    if not tried:
        return None
    rows = endings.get("length", 0)
    low, high = interval(rows, tried)
    return {"rows": rows, "tried": tried, "share": rows / tried, "low": low, "high": high}


def _problems(sampled: Sample, job: Job) -> dict[str, Any]:
    """Rows that get no answer, by error code, and those that are too long, with the 95% intervals of their shares."""
    low, high = interval(sampled.too_long, sampled.rows)
    return {
        "too_long": {
            "rows": sampled.too_long,
            "share": sampled.too_long / max(1, sampled.rows),
            "low": low if not sampled.complete else sampled.too_long / max(1, sampled.rows),
            "high": high if not sampled.complete else sampled.too_long / max(1, sampled.rows),
            "becomes": "an error" if job.prompt.truncate is None else f"cut on the {job.prompt.truncate}",
        },
        "errors": {
            code: {"rows": count, "example": text} for code, (count, text) in sampled.examples().items()
        },
    }


def _prompt_lines(found: dict[str, Any]) -> list[RenderableType]:
    tokens, problems = found["prompt_tokens"], found["problems"]
    sampled = tokens.get("rows") or sum(error["rows"] for error in problems["errors"].values())
    shown: list[RenderableType] = []
    new = f" with {found['max_new_tokens']:,} new tokens" if found["max_new_tokens"] else ""
    if tokens:
        repeated = tokens["duplicates"]
        same = f"; duplicates among the sampled prompts: {repeated:,}" if repeated else ""
        shown += [
            f"prompt tokens of {sampled:,} sampled rows: half have at most {tokens['p50']:,}, 90% {tokens['p90']:,}, "
            f"99% {tokens['p99']:,}, all {tokens['max']:,}; context {found['context']:,}{new}",
            _bars(tokens["histogram"]),
            f"about {tokens['estimated_total']:,} prompt tokens in all; {tokens['shared_prefix']:.0%} of them repeat "
            f"the beginning of another prompt{same}",
        ]
    shown += found["orders"]["lines"] if found["orders"] else []
    long = problems["too_long"]
    if long["rows"]:
        shown.append(
            f"{long['share']:.1%} of the rows are too long ({long['low']:.1%} to {long['high']:.1%}), each of them "
            f"{long['becomes']}"
        )
    if (cut := found["cut"]) is not None and found["max_new_tokens"]:
        fate = ", and a cut one is its row's INVALID_OUTPUT" if found["invalid_if_cut"] else ""
        shown.append(
            f"{cut['share']:.1%} of the answers were cut at generation.max_new_tokens ({cut['rows']:,} of "
            f"{cut['tried']:,} tried; {cut['low']:.1%} to {cut['high']:.1%} of all){fate}"
        )
    for code, error in problems["errors"].items():
        shown.append(f"{code}: {error['rows']:,} of {sampled:,} sampled rows, e.g. {error['example']}")
    return shown


def _bars(histogram: list[dict[str, int]]) -> Table:
    most = max(bin_["rows"] for bin_ in histogram)
    table = Table.grid(padding=(0, 2))
    table.add_column(justify="right")
    table.add_column(width=BAR_WIDTH)
    table.add_column(justify="right")
    for bin_ in histogram:
        bar = Bar(most, 0, bin_["rows"], width=BAR_WIDTH)
        table.add_row(f"{bin_['from']:,} to {bin_['to']:,}", bar, f"{bin_['rows']:,}")
    return table


def _estimate_lines(found: dict[str, Any]) -> list[RenderableType]:
    left = found["rows_left"]
    if not left:
        return [
            "nothing is left to do: every part is there" if found["rows"] else "there is nothing to generate"
        ]
    about = found["estimate"]
    if about is None:
        return [
            "how long: this model's throughput on this machine is not known; add --trial 60s, or run "
            "`batchrun bench` with the job file"
        ]

    out = about["output_tokens"]
    tokens = (
        "nothing is generated"
        if not found["max_new_tokens"]
        else f"at most {out['likely']:,.0f} output tokens: the answers' lengths are not known, max_new_tokens for each"
        if about["output_bound"]
        else f"about {out['likely']:,.0f} output tokens"
    )
    part = "" if left == found["rows"] else f" for the {left:,} rows that are left"
    unused = found["unused_gpus"]
    each = about["gpus_per_worker"]
    return [
        f"how long{part}: {_how_long(about)}",
        *([f"{counted(unused, 'GPU')} unused: an engine takes {each} (engine.gpus)"] if unused else []),
        f"{tokens}; from {about['source']}; the intervals are meant to hold nine times in ten",
    ]


def _how_long(about: dict[str, Any]) -> str:
    """Time, GPU-hours and money of an estimate, each with its interval."""

    def spoken(figures: dict[str, float], form: Any) -> str:
        return f"{form(figures['likely'])} ({form(figures['low'])} to {form(figures['high'])})"

    money = "" if about["cost"] is None else f", cost {spoken(about['cost'], '{:,.2f}'.format)}"
    hours = spoken(about["gpu_hours"], "{:,.2f}".format)
    each = "" if about["gpus_per_worker"] == 1 else f" of {about['gpus_per_worker']} GPUs"
    return (
        f"{spoken(about['seconds'], duration)} on {counted(about['workers'], 'worker')}{each}, "
        f"{hours} GPU-hours{money}"
    )
