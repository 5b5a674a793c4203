"""`batchrun bench`: what this machine makes of a model and a distribution of lengths, engine against engine.

Weights and tokens are random, so a row costs only by its lengths, and no model needs to be downloaded.
"""

from __future__ import annotations

import copy
import pkgutil
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers

from batchrun.commands.roofline import Ceilings, floor_seconds, measure_ceilings
from batchrun.commands.workloads import Workload
from batchrun.driver.prepare import prepare
from batchrun.engine.choose import BUILT_IN
from batchrun.engine.layers import fp8
from batchrun.engine.protocol import Completion, EngineSpec, EngineStats, Request
from batchrun.engine.weights.loading import random_model
from batchrun.errors import EngineError, JobError, ModelError, first_line
from batchrun.estimate.cost import Observation, Throughput
from batchrun.estimate.records import device_name, model_key, remember
from batchrun.estimate.sample import sample
from batchrun.job.job import Job

# Rows without a word from the user: enough to fill a GPU, and few enough for minutes on a CPU.
GPU_ROWS, CPU_ROWS = 1000, 100
# Rows that came back wrong, as far as a message names them.
SHOWN_ROWS = 5
# Rows that warm an engine up on a CPU, where nothing is compiled for a shape.
CPU_WARM_ROWS = 8

SHAPES: dict[str, dict[str, Any]] = {
    "qwen3-0.6b": {
        "model_type": "qwen3", "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072,
        "num_hidden_layers": 28, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960, "tie_word_embeddings": True,
    },
    "llama-8b": {
        "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
        "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 131072, "tie_word_embeddings": False,
    },
    "qwen3-30b-a3b": {
        "model_type": "qwen3_moe", "vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144,
        "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8, "norm_topk_prob": True,
        "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128,
        "max_position_embeddings": 40960, "tie_word_embeddings": False,
    },
    "tiny": {
        "model_type": "llama", "vocab_size": 4096, "hidden_size": 128, "intermediate_size": 384,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
        "max_position_embeddings": 32768, "tie_word_embeddings": True,
    },
}  # fmt: skip
"""Models by name, for who has none at hand. "tiny" is for machines without a GPU."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One engine's run over a workload, everything warm. `floor_seconds` is what the ceilings of its `gpus` allow at
    best, `prompt_seconds` what the same rows took with a single new token each."""

    engine: str
    workload: str
    rows: int
    prompt_tokens: int
    output_tokens: int
    seconds: float
    first_row_seconds: float
    floor_seconds: float
    prompt_seconds: float
    stats: EngineStats
    notes: tuple[str, ...] = ()
    gpus: int = 1

    @property
    def tokens_per_second(self) -> float:
        """Output tokens per second of the whole run."""
        return self.output_tokens / self.seconds

    @property
    def roofline_share(self) -> float:
        """The share of the ceilings that was reached, 1.0 at best."""
        return self.floor_seconds / self.seconds


def bench(
    model: str | Path,
    workload: Workload | str,
    rows: int | None = None,
    engines: Sequence[str] | None = None,
    device: str | None = None,
    dtype: str = "auto",
    options: dict[str, object] | None = None,
    seed: int = 0,
    quantization: str | None = None,
    cache_dtype: str = "auto",
    gpus: int = 1,
) -> list[Measured]:
    """Runs a workload through each engine and times it, from the first request to the last completion.

    Args:
        model: a name of SHAPES, or a local folder with a config.json (its weights are not read).
        workload: a name of WORKLOADS or a shape (then `rows` and `seed` count), or rows of a job.
        engines: kinds, as in the job file; by default all that can do it on a GPU, and on a CPU the padded one, since
            the paged one is several times slower there.
        device: a GPU where there is one, by default.
        options: engine settings, as in the job file.
        quantization: of the weights, "fp8" or None.
        cache_dtype: of keys and values, "fp8" or "auto".
        gpus: that share the engine.

    Raises:
        JobError: an unknown workload or engine. ModelError: no such model, or none that so many GPUs can share.
        EngineError: a row was not answered.
    """
    device = device or _device()
    fp8_cache = cache_dtype == "fp8"
    if not engines:
        only_paged = fp8_cache or gpus > 1
        engines = ["paged"] if only_paged else ["padded"] if device == "cpu" else list(BUILT_IN)
    if fp8_cache and "padded" in engines:
        raise JobError("only the paged engine keeps keys and values in fp8", "bench", "use --engine paged")
    if gpus > 1 and "padded" in engines:
        raise JobError("the padded engine runs on one GPU", "bench", "use --engine paged")
    for kind in engines:
        if kind not in BUILT_IN:
            raise JobError(f"no engine {kind!r} to measure", "bench", f"use {', '.join(BUILT_IN)}")
    config = _config(model)
    if dtype == "auto":
        dtype = "float32" if device == "cpu" else "bfloat16"
    vocabulary = config.get_text_config().vocab_size
    if isinstance(workload, str):
        workload = Workload.named(workload, rows or _rows(device), vocabulary, seed)
    if (quantization or fp8_cache) and (reason := fp8.unsupported_device(torch.device(device))):
        raise JobError(f"fp8 cannot run here, since {reason}", "bench", "measure without it")
    ceilings = measure_ceilings(device, getattr(torch, dtype), quantization)
    spec = EngineSpec(
        "",
        str(model),
        str(model),
        dtype=dtype,
        quantization=quantization,
        cache_dtype=cache_dtype,
        device=device,
        max_context=workload.longest,
        options=options or {},
        gpus=gpus,
    )
    return [_measure(kind, spec, config, workload, ceilings) for kind in engines]


def bench_job(job: Job, rows: int | None = None, engines: Sequence[str] | None = None) -> list[Measured]:
    """The same with a job's model, engine settings and a sample of its rows, each of which generates all it may.

    What comes of it is remembered on this machine, for `batchrun plan`.

    Raises:
        Refused: what a run of the job would be refused for.
    """
    prepared = prepare(job)
    sampled = sample(prepared, rows or _rows(_device()))
    prompts = [prompt.tolist() for prompt in sampled.prompts]
    if not prompts:
        faults = "; ".join(
            f"{count:,} {code}: {message}" for code, (count, message) in sampled.examples().items()
        )
        raise JobError(
            f"no sampled row of the job has a prompt ({faults or 'no rows'})",
            "bench",
            "check the data and the template",
        )
    notes = [f"  {code}: {count:,}, e.g. {message}" for code, (count, message) in sampled.examples().items()]
    if notes:
        notes.insert(
            0, f"{len(sampled.faults):,} of {sampled.rows:,} sampled rows have no prompt and are left out"
        )
    if (samples := job.generation.samples) > 1:
        notes.append(f"each row is answered once here, and {samples} times in a run (generation.samples)")
    workload = Workload("job", prompts, sampled.new_tokens, tuple(notes))
    if engines is None and job.engine.kind in BUILT_IN:
        engines = [job.engine.kind]
    options = job.engine.model_dump(exclude={"kind", "cache_dtype", "gpus"})
    results = bench(
        prepared.model.path,
        workload,
        engines=engines,
        dtype=job.model.dtype,
        options=options,
        quantization=job.model.quantization,
        cache_dtype=job.engine.cache_dtype,
        gpus=prepared.gpus,
    )
    for result in results:
        remember(model_key(prepared), result.engine, None, _throughput(result))
    return results


def _throughput(result: Measured) -> Throughput:
    rows, tokens = result.rows, result.prompt_tokens
    seen = [
        Observation(rows, tokens, rows, result.prompt_seconds),
        Observation(rows, tokens, result.output_tokens, result.seconds),
    ]
    source = f"a bench of {rows:,} rows"
    return Throughput(source, result.engine, device_name(), seen, own_rows=False, gpus=result.gpus)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def _rows(device: str) -> int:
    return CPU_ROWS if device == "cpu" else GPU_ROWS


def format_results(results: Sequence[Measured]) -> str:
    """A table for people."""
    lines = [
        f"{'engine':8} {'workload':10} {'rows':>6} {'tokens in':>10} {'out':>9} {'seconds':>8} {'out/s':>8} "
        f"{'padding eff.':>12} {'roofline':>8} {'first row':>9}"
    ]
    lines += [
        f"{r.engine:8} {r.workload:10} {r.rows:6} {r.prompt_tokens:10} {r.output_tokens:9} {r.seconds:8.2f} "
        f"{r.tokens_per_second:8.0f} {r.stats.padding_efficiency:12.1%} {r.roofline_share:8.1%} "
        f"{r.first_row_seconds:8.2f}s"
        for r in results
    ]
    last = results[-1].stats
    notes = dict.fromkeys(note for r in results for note in (*r.notes, *r.stats.notes))
    shared = f"{results[-1].gpus} of " if results[-1].gpus > 1 else ""
    lines.append(
        f"{shared}{last.device}, {last.dtype}; "
        + ", ".join(f"{r.engine}: {r.stats.attention}" for r in results)
    )
    if last.device == "cpu" and all(r.engine != "paged" for r in results):
        lines.append(
            "the paged engine, several times slower on a CPU, was left out; --engine paged measures it"
        )
    return "\n".join([*lines, *notes])


def _measure(kind: str, spec: EngineSpec, config: Any, workload: Workload, ceilings: Ceilings) -> Measured:
    dtype = getattr(torch, spec.dtype)
    vocabulary = config.get_text_config().vocab_size
    prompts_alone = [
        replace(request, max_new_tokens=1) for request in workload.requests(vocabulary, other_tokens=2)
    ]
    requests = workload.requests(vocabulary)
    with _loaded(kind, spec, config) as running:
        # Once for whatever an engine prepares when it first meets a shape; other tokens, so that nothing is shared.
        warm = workload.requests(vocabulary, other_tokens=1)
        _run(running, warm if spec.device != "cpu" else warm[:CPU_WARM_ROWS])
        prompt_seconds, _, completions = _run(running, prompts_alone)
        _check(kind, prompts_alone, completions)
        before = copy.deepcopy(running.stats)
        seconds, first, completions = _run(running, requests)
        _check(kind, requests, completions)
        stats = copy.deepcopy(running.stats)
    for name in ("requests", "completions", "prompt_tokens", "output_tokens", "computed_tokens", "batches"):
        setattr(stats, name, getattr(stats, name) - getattr(before, name))
    prompt_tokens = sum(len(p) for p in workload.prompts)
    weight_bytes = fp8.FP8.itemsize if spec.quantization else dtype.itemsize
    floor = floor_seconds(config, workload, ceilings, dtype.itemsize, weight_bytes, spec.cache_dtype == "fp8")
    return Measured(
        kind,
        workload.name,
        len(requests),
        prompt_tokens,
        sum(workload.new_tokens),
        seconds,
        first,
        floor / spec.gpus,
        prompt_seconds,
        stats,
        workload.notes,
        spec.gpus,
    )


@contextmanager
def _loaded(kind: str, spec: EngineSpec, config: Any) -> Iterator[Any]:
    """The engine, on random weights."""
    engine = pkgutil.resolve_name(BUILT_IN[kind])
    if kind == "padded":
        yield engine(spec, random_model(spec, config))
        return
    with closing(engine.load(spec, config)) as running:
        yield running


def _run(engine: Any, requests: list[Request]) -> tuple[float, float, list[Completion]]:
    """Seconds to the last and to the first completion, and all completions."""
    completions = []
    first = 0.0
    started = time.perf_counter()
    feed: Iterator[Request] = iter(requests)
    for completion in engine.generate(feed):
        first = first or time.perf_counter() - started
        completions.append(completion)
    return time.perf_counter() - started, first, completions


def _check(kind: str, requests: Sequence[Request], completions: Sequence[Completion]) -> None:
    """Raises EngineError, naming rows and what is wrong with them, unless each was answered at its full length."""
    by_row: dict[int, list[Completion]] = {request.id: [] for request in requests}
    for completion in completions:
        by_row.setdefault(completion.id, []).append(completion)
    expected = {request.id: request.max_new_tokens for request in requests}
    wrong = [
        f"row {row}: {expected.get(row, 0)} tokens expected, {_received(found)}"
        for row, found in by_row.items()
        if len(found) != 1 or found[0].fault or len(found[0].token_ids) != expected.get(row)
    ]
    if not wrong:
        return
    more = "; ..." if len(wrong) > SHOWN_ROWS else ""
    raise EngineError(
        f"{len(wrong):,} of {len(requests):,} rows came back wrong: {'; '.join(wrong[:SHOWN_ROWS])}{more}",
        f"{kind} engine",
        "if a row's error does not name the cause, report this as a bug",
    )


def _received(found: Sequence[Completion]) -> str:
    if not found:
        return "no completion"
    one = found[0]
    again = f", completed {len(found)} times" if len(found) > 1 else ""
    error = f", error {one.fault}" if one.fault else ""
    return f"{len(one.token_ids)} received, finish reason {one.finish_reason}{again}{error}"


def _config(model: str | Path) -> Any:
    if str(model) in SHAPES:
        return transformers.AutoConfig.for_model(**SHAPES[str(model)])
    try:
        return transformers.AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        what = f"no model configuration ({first_line(error)})"
        raise ModelError(what, str(model), f"give a local folder, or one of {', '.join(SHAPES)}") from error
