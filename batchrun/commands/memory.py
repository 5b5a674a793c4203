"""What `batchrun plan` says of memory: what each GPU of an engine holds, and how many rows fit beside the weights."""

from __future__ import annotations

from typing import Any

from batchrun.driver.gpus import SUPPOSED_MEMORY, USEFUL_ROWS, budget_of, smallest
from batchrun.driver.prepare import Prepared
from batchrun.estimate.sample import Sample
from batchrun.job.job import Job
from batchrun.model.memory import model_memory
from batchrun.telemetry.printable import counted
from batchrun.units import size

# Of one engine; more than that no machine has.
MOST_GPUS = 16


def of(job: Job, prepared: Prepared, sampled: Sample) -> dict[str, Any] | None:
    """Bytes on each of an engine's GPUs, and the rows that fit, without and with fp8 weights; None where the model's
    sizes are not known.

    Args:
        job: as it was written, whose `engine.gpus` may be "auto".
    """
    model, gpus = prepared.model, prepared.gpus
    found = model_memory(model.path, model.used, job.model.dtype)
    if found is None or not len(sampled.lengths):
        return None
    tokens = float(sampled.lengths.mean()) + max(sampled.new_tokens)
    name, budget = budget_of(job)
    fp8, fp8_cache = job.model.quantization == "fp8", job.engine.cache_dtype == "fp8"
    weights = found.weights_of(gpus, fp8)
    return {
        "gpu": name,
        "quantization": job.model.quantization,
        "convertible": job.model.adapters is None and found.fp8_weights != found.weights,
        "weights": found.weights,
        "fp8_weights": found.fp8_weights,
        "cache_dtype": job.engine.cache_dtype,
        "token": found.token,
        "fp8_token": found.fp8_token,
        "stored": found.stored,
        "row_tokens": round(tokens),
        "rows": found.rows(budget, tokens, False, gpus, fp8_cache),
        "fp8_rows": found.rows(budget, tokens, True, gpus, fp8_cache),
        # The padded engine keeps them in the model's format alone.
        "other_cache_rows": None
        if job.engine.kind == "padded"
        else found.rows(budget, tokens, fp8, gpus, not fp8_cache),
        "gpus": gpus,
        "chosen": job.engine.gpus == "auto",
        "each_weights": weights,
        "each_cache": max(0, int(budget - weights)),
        "smaller_rows": found.rows(budget, tokens, fp8, gpus // 2, fp8_cache) if gpus > 1 else None,
        "smallest_gpus": smallest(found, budget, tokens, fp8, MOST_GPUS, fp8_cache),
    }


def lines(memory: dict[str, Any] | None) -> list[str]:
    """The same for a person."""
    if memory is None:
        return []
    fp8 = memory["quantization"] == "fp8"
    ours, theirs = ("fp8_weights", "weights") if fp8 else ("weights", "fp8_weights")
    rows, other_rows = ("fp8_rows", "rows") if fp8 else ("rows", "fp8_rows")
    card = memory["gpu"] or f"a GPU of {size(SUPPOSED_MEMORY)}"
    where = card if memory["gpus"] == 1 else f"{memory['gpus']} GPUs ({card})"
    other = "without model.quantization" if fp8 else "with model.quantization: fp8"
    fp8_cache = memory["cache_dtype"] == "fp8"
    token, other_token = ("fp8_token", "token") if fp8_cache else ("token", "fp8_token")
    other_cache = "without engine.cache_dtype" if fp8_cache else "with engine.cache_dtype: fp8"
    shown = [
        f"memory: weights {size(memory[ours])}, a token's keys and values {size(memory[token])}; at most about "
        f"{memory[rows]:,} rows of {memory['row_tokens']:,} tokens at once on {where}",
        *_gpu_lines(memory, memory[rows]),
    ]
    if memory["stored"] is not None:
        shown.append(
            f"the checkpoint's quantized weights are expanded while loading: {size(memory[ours])} in memory, "
            f"{size(memory['stored'])} in its files"
        )
    if memory["convertible"]:
        shown.append(
            f"{other}: weights {size(memory[theirs])}, {memory[other_rows]:,} rows"
            + ("" if fp8 else "; matrix products take about half as long, answers differ a little")
        )
    if (other_cache_rows := memory["other_cache_rows"]) is not None:
        shown.append(
            f"{other_cache}: a token's keys and values {size(memory[other_token])}, {other_cache_rows:,} rows"
            + ("" if fp8_cache else "; answers differ a little")
        )
    return shown


def _gpu_lines(memory: dict[str, Any], rows: int) -> list[str]:
    """How many GPUs an engine takes and why, and what each of them holds."""
    gpus, fitting = memory["gpus"], memory["smallest_gpus"]
    holds = f"{size(memory['each_weights'])} of weights and {size(memory['each_cache'])} for keys and values"
    if memory["chosen"]:
        why = f"the smallest power of two at which {USEFUL_ROWS} rows fit"
        if gpus > 1:
            why += f"; {counted(gpus // 2, 'GPU')} would hold {memory['smaller_rows']:,}"
        each = "it" if gpus == 1 else "each"
        return [f"engine.gpus: auto takes {gpus}, {why}; {each} holds {holds}"]
    shown = [f"engine.gpus: {gpus}; each GPU holds {holds}"] if gpus > 1 else []
    if rows < USEFUL_ROWS and fitting is not None and fitting > gpus:
        shown.append(
            f"fewer than {USEFUL_ROWS} rows at once leave a GPU idle: engine.gpus: {fitting} would hold them"
        )
    return shown
