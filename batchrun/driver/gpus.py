"""How many GPUs an engine of the job takes: as many as the job says, or as few as hold its model and enough rows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from batchrun.dataset.rows import all_rows
from batchrun.errors import JobError, RowFault
from batchrun.job.job import Job
from batchrun.model.memory import ModelMemory, attention_heads, model_memory
from batchrun.telemetry.gpu import gpu_now, visible_gpus
from batchrun.telemetry.printable import counted

if TYPE_CHECKING:
    from batchrun.driver.prepare import Prepared

# Rows at once below which an engine mostly reads weights: on an H100 a decode step of 64 rows takes about as long as
# one of 16.
USEFUL_ROWS = 64
# Bytes of a GPU, where this machine has none.
SUPPOSED_MEMORY = 80 << 30
_LOOKED_AT = 64


def settle(prepared: Prepared) -> Prepared:
    """The same with a job whose `engine.gpus` is a number.

    Raises:
        JobError: it does not divide the model's attention heads, or what "auto" chooses by is not known.
    """
    asked = prepared.job.engine.gpus
    gpus = _choose(prepared) if asked == "auto" else asked
    if gpus > 1 and ":" not in prepared.job.engine.kind:
        _refuse_uneven(prepared, gpus)
    return prepared if gpus == asked else replace(prepared, job=with_gpus(prepared.job, gpus))


def with_gpus(job: Job, gpus: int) -> Job:
    """The job with so many GPUs for an engine."""
    return job.model_copy(update={"engine": job.engine.model_copy(update={"gpus": gpus})})


def smallest(
    memory: ModelMemory, budget: float, tokens: float, fp8: bool, most: int, fp8_cache: bool = False
) -> int | None:
    """The smallest power of two, up to `most`, at which USEFUL_ROWS of so many tokens fit; None where there is none.

    Args:
        budget: bytes of each GPU that an engine may use.
    """
    gpus = 1
    while gpus <= most and memory.is_divided_by(gpus):
        if memory.rows(budget, tokens, fp8, gpus, fp8_cache) >= USEFUL_ROWS:
            return gpus
        gpus *= 2
    return None


def budget_of(job: Job) -> tuple[str | None, float]:
    """This machine's first GPU, and the bytes that an engine may use of each; None and a common one's without any."""
    gpu = gpu_now()
    memory = gpu.memory_total if gpu else SUPPOSED_MEMORY
    return gpu.name if gpu else None, job.engine.memory_fraction * memory


def _choose(prepared: Prepared) -> int:
    job, model = prepared.job, prepared.model
    visible = visible_gpus()
    if job.engine.kind == "padded" or (job.cluster.is_local and not visible):
        return 1
    where = "engine.gpus: auto"
    memory = model_memory(model.path, model.used, job.model.dtype)
    if memory is None:
        what = "the model's sizes are not known: it has no safetensors, or a config of another kind"
        raise JobError(what, where, "set engine.gpus to a number")
    fp8, fp8_cache = job.model.quantization == "fp8", job.engine.cache_dtype == "fp8"
    tokens = _row_tokens(prepared)
    _, budget = budget_of(job)
    if not job.cluster.is_local:
        # The driver's own machine says nothing of theirs.
        supposed = job.engine.memory_fraction * SUPPOSED_MEMORY
        found = smallest(memory, supposed, tokens, fp8, memory.key_heads, fp8_cache)
        hint = f", {found} where they have 80 GiB" if found else ""
        raise JobError(
            "how much memory the workers' GPUs have is not known here",
            where,
            f"set engine.gpus to a number{hint}",
        )
    chosen = smallest(memory, budget, tokens, fp8, len(visible), fp8_cache)
    if chosen is None:
        most = max(n for n in (1, 2, 4, 8, 16) if n <= len(visible) and memory.is_divided_by(n))
        gib = memory.weights_of(1, fp8) / (1 << 30)
        raise JobError(
            f"weights of {gib:,.1f} GiB and {USEFUL_ROWS} rows of {tokens:,.0f} tokens "
            f"do not fit on {counted(most, 'GPU')}, the most that {counted(len(visible), 'GPU')} here and "
            f"{memory.key_heads} key heads allow",
            where,
            "use a larger machine or model.quantization: fp8, or set engine.gpus to a number",
        )
    return chosen


def _row_tokens(prepared: Prepared) -> float:
    """Tokens of a row, prompt and answer: the first rows' mean prompt, and the longest answer there may be."""
    codec = prepared.codec
    new = prepared.job.generation.defaults.max_new_tokens
    lengths: list[int] = []
    for batch in all_rows(prepared.job, prepared.plan, codec.builder.columns):
        made = codec.builder.build(batch.slice(0, _LOOKED_AT))
        lengths += [len(prompt) for prompt in made if not isinstance(prompt, RowFault)]
        if len(lengths) >= _LOOKED_AT:
            break
    longest = codec.engine.max_context
    return min(sum(lengths) / len(lengths) + new, float(longest)) if lengths else float(longest)


def _refuse_uneven(prepared: Prepared, gpus: int) -> None:
    config = json.loads((Path(prepared.model.path) / "config.json").read_bytes())
    heads = attention_heads(config)
    if heads is not None and any(count % gpus for count in heads):
        what = f"{gpus} GPUs cannot share out {heads[0]} attention heads and {heads[1]} of keys and values"
        even = [n for n in (2, 4, 8) if not any(count % n for count in heads)]
        fix = f"use {' or '.join(map(str, even))}" if even else "run it on one GPU"
        raise JobError(what, "engine.gpus", fix)
