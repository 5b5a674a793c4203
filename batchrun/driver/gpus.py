"""How many GPUs an engine of the job takes: as many as the job says, or as few as hold its model and enough rows."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from batchrun.errors import JobError
from batchrun.job.job import Job
from batchrun.model.files import read_json
from batchrun.model.folder import ModelFolder
from batchrun.model.memory import ModelMemory, attention_heads, model_memory
from batchrun.telemetry.gpu import gpu_now, visible_gpus
from batchrun.telemetry.printable import counted
from batchrun.units import size

# Rows at once below which an engine mostly reads weights: on an H100 a decode step of 64 rows takes about as long as
# one of 16.
USEFUL_ROWS = 64
# Bytes of a GPU, where this machine has none.
SUPPOSED_MEMORY = 80 << 30


def gpus_of(job: Job, model: ModelFolder, row_tokens: Callable[[], float]) -> int:
    """The job's `engine.gpus` as a number.

    Args:
        row_tokens: gives the tokens of a row, prompt and answer; asked only where "auto" needs them.

    Raises:
        JobError: it does not divide the model's attention heads, or what "auto" chooses by is not known.
    """
    gpus = job.engine.gpus
    if gpus == "auto":
        gpus = _choose(job, model, row_tokens)
    if gpus > 1 and ":" not in job.engine.kind:
        _refuse_uneven(model, gpus)
    return gpus


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


def _choose(job: Job, model: ModelFolder, row_tokens: Callable[[], float]) -> int:
    visible = visible_gpus()
    if job.engine.kind == "padded" or (job.cluster.is_local and not visible):
        return 1
    where = "engine.gpus: auto"
    memory = model_memory(model.path, model.used, job.model.dtype)
    if memory is None:
        what = "the model's sizes are not known: it has no safetensors, or a config of another kind"
        raise JobError(what, where, "set engine.gpus to a number")
    fp8, fp8_cache = job.model.quantization == "fp8", job.engine.cache_dtype == "fp8"
    tokens = row_tokens()
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
        other = " or model.quantization: fp8" if memory.fp8_weights < memory.weights and not fp8 else ""
        raise JobError(
            f"weights of {size(memory.weights_of(1, fp8))} and {USEFUL_ROWS} rows of {tokens:,.0f} tokens "
            f"do not fit on {counted(most, 'GPU')}, the most that {counted(len(visible), 'GPU')} here and "
            f"{memory.key_heads} key heads allow",
            where,
            f"use a larger machine{other}, or set engine.gpus to a number",
        )
    return chosen


def _refuse_uneven(model: ModelFolder, gpus: int) -> None:
    config = read_json(Path(model.path) / "config.json")
    heads = attention_heads(config)
    if heads is not None and any(count % gpus for count in heads):
        what = f"{gpus} GPUs cannot share out {heads[0]} attention heads and {heads[1]} of keys and values"
        even = [n for n in (2, 4, 8) if not any(count % n for count in heads)]
        fix = f"use {' or '.join(map(str, even))}" if even else "run it on one GPU"
        raise JobError(what, "engine.gpus", fix)
