"""The sampled rows through the model with and without fp8: how far the answers agree."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import numpy as np

from batchrun.driver.prepare import Prepared
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import Completion, EngineSpec, Request
from batchrun.errors import EngineError, JobError, ModelError
from batchrun.estimate.sample import Sample, spread
from batchrun.estimate.trial import requests_of
from batchrun.telemetry.agreement import Agreement

# At most, of the sample: the share of tokens that agree is then known to about a point.
ROWS = 256
# That are given to the engine at once, between two looks at the time.
STREAM = 32
# Seconds for a model to load and for what an engine compiles.
LOADING = 600.0


def compare(prepared: Prepared, sampled: Sample, quantization: Literal["fp8"], seconds: float) -> Agreement:
    """Generates answers to sampled rows without and with fp8, each token the likeliest, and holds one against the
    other. What is in fp8 is what the job says, or else the weights, converted by `quantization`. The rows are as many
    as come out in about half of the seconds without it, at most ROWS.

    Raises:
        JobError: the model, or the machine, has no fp8. EngineError: rows were not finished in time. ModelError,
            EngineDied: what an engine ended with.
    """
    spec = prepared.codec.engine
    greedy = replace(spec.sampling, temperature=0.0, logprobs=0)
    spec = replace(spec, sampling=greedy)
    plain_spec = replace(spec, quantization=None, cache_dtype="auto")
    in_fp8 = prepared.job.fp8
    fp8_spec = spec if in_fp8 else replace(spec, quantization=quantization)
    requests = [_greedy(request) for request in requests_of(sampled, spec, samples=1)]
    if not requests:
        raise EngineError("no sampled row has a prompt", "plan --compare", "fix the prompt first")
    chosen = [requests[i] for i in spread(len(requests))[:ROWS]]
    plain = _answers(plain_spec, chosen, seconds / 2)
    again = [request for request in chosen if request.id in plain]
    try:
        quantized = _answers(fp8_spec, again, None)
    except ModelError as error:
        if in_fp8 or error.where != "model.quantization":
            raise
        # A key that the job does not have.
        raise JobError(error.what, "plan --compare", "leave out --compare") from error
    return agreement(in_fp8 or quantization, [(plain[one.id], quantized[one.id]) for one in again])


def agreement(quantization: str, pairs: Sequence[tuple[Completion, Completion]]) -> Agreement:
    """Of the same rows' completions, without quantization and with it, both with their log probabilities."""
    places, distances = [], [np.zeros(0)]
    agreeing = 0
    for plain, other in pairs:
        common = min(len(plain.token_ids), len(other.token_ids))
        differs = np.flatnonzero(plain.token_ids[:common] != other.token_ids[:common])
        alike = int(differs[0]) if len(differs) else common
        if len(differs) or len(plain.token_ids) != len(other.token_ids):
            places.append(alike + 1)
        agreeing += alike
        if alike:
            distances.append(np.abs(plain.values["logprobs"][:alike] - other.values["logprobs"][:alike]))
    all_distances = np.concatenate(distances)
    return Agreement(
        quantization,
        rows=len(pairs),
        same=len(pairs) - len(places),
        tokens=sum(len(plain.token_ids) for plain, _ in pairs),
        agreeing=agreeing,
        first_difference=int(np.median(places)) if places else None,
        logprob_difference=float(all_distances.mean()) if len(all_distances) else 0.0,
        ended=sum(plain.finish_reason == "stop" for plain, _ in pairs),
        quantized_ended=sum(other.finish_reason == "stop" for _, other in pairs),
    )


def _greedy(request: Request) -> Request:
    own = request.sampling
    return request if own is None else replace(request, sampling=replace(own, temperature=0.0))


def _answers(spec: EngineSpec, requests: Sequence[Request], seconds: float | None) -> dict[int, Completion]:
    """The completions by id: of all requests, or of streams of them until the seconds are over."""
    found: dict[int, Completion] = {}
    engine = EngineProcess(spec)
    try:
        engine.load()
        started = time.monotonic()
        for first in range(0, len(requests), STREAM):
            if found and seconds is not None and time.monotonic() - started > seconds:
                break
            for completion in engine.generate(iter(requests[first : first + STREAM])):
                if completion is not None:
                    found[completion.id] = completion
                elif time.monotonic() - started > LOADING + (seconds or 0.0):
                    raise EngineError(
                        f"{len(requests)} rows were not finished in time",
                        "plan --compare",
                        "give a shorter --trial",
                    )
    finally:
        engine.stop()
    return found
