"""A short trial: sampled rows through the job's own engine, timed so that the whole job can be told from them."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from batchrun.driver.prepare import Prepared
from batchrun.engine.padded.batching import by_length, take_batch
from batchrun.engine.processes.process import EngineProcess
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.errors import EngineError
from batchrun.estimate.cost import Observation, Throughput
from batchrun.estimate.sample import Sample, spread
from batchrun.prompt.codec import request_of
from batchrun.prompt.scoring import requests as scored_requests

# Rows; each stream is twice as long as the one before.
FIRST_STREAM = 32
# Rows that go through the engine untimed, for what it does only once.
WARM_ROWS = 8


def trial(
    prepared: Prepared, sampled: Sample, seconds: float, opening: float
) -> tuple[Throughput, Counter[str]]:
    """Generates answers for some of the sampled rows, for about so long once the engine is loaded; gives how fast that
    was, and the rows by their finish reasons.

    Where the engine cuts batches by a budget of padded tokens, the sample is cut into the very batches that a window
    of it would become, and batches at equal distances are run. Any other engine gets streams of twice as many rows
    each time; what the last one took beyond the one before it is the cost of those rows without the ramps at both
    ends. `opening` is how many seconds the driver took until the plan was there.

    Raises:
        EngineError: nothing was finished in twice the time. ModelError, EngineDied: what the engine ended with.
    """
    samples = prepared.job.generation.samples
    requests = requests_of(sampled, prepared.codec.engine, samples)
    if not requests:
        raise EngineError("no sampled row has a prompt", "plan --trial", "fix the prompt first")
    endings: Counter[str] = Counter()
    started = time.monotonic()
    engine = EngineProcess(prepared.codec.engine)
    try:
        shortest = min(requests, key=lambda request: len(request.token_ids))
        _run(engine, [replace(shortest, max_new_tokens=1)], started + 600, Counter())
        loaded = time.monotonic()
        # A worker imports the same libraries and opens the same tokenizer once more.
        start_seconds = loaded - started + 2 * opening
        budget = engine.stats().gauges.get("batch_tokens")
        if budget is None:
            observations = _streams(engine, requests, seconds, samples, endings)
        else:
            observations = _batches(engine, requests, int(budget), seconds, samples, endings)
        stats = engine.stats()
    finally:
        engine.stop()
    source = f"a trial of {sum(o.rows for o in observations):,.0f} rows in {time.monotonic() - loaded:.0f} s"
    return Throughput(
        source, stats.engine, stats.device, observations, True, start_seconds, prepared.gpus
    ), endings


def requests_of(sampled: Sample, spec: EngineSpec, samples: int) -> list[Request]:
    """A row's samples one after another; of a row that is scored, its first request: the others have its prompt in
    common with that."""
    found: list[Request] = []
    for i, (prompt, limit) in enumerate(zip(sampled.built, sampled.new_tokens, strict=True)):
        if prompt.behind is not None:
            first = replace(prompt.behind, requests=prompt.behind.requests[:1])
            found += scored_requests(prompt.token_ids, first, i, [i], prompt.adapter)
            continue
        found += [
            request_of(i * samples + sample, prompt, i, limit, spec, sample) for sample in range(samples)
        ]
    return found


def _batches(
    engine: EngineProcess,
    requests: list[Request],
    budget: int,
    seconds: float,
    samples: int,
    endings: Counter[str],
) -> list[Observation]:
    waiting = deque(by_length(requests))
    batches: list[list[Request]] = []
    while waiting:
        batches.append(take_batch(waiting, budget).requests)
    work = np.array([sum(len(r.token_ids) + r.max_new_tokens for r in batch) for batch in batches])
    order = _by_work(work)
    deadline = time.monotonic() + seconds
    _run(engine, batches[order[0]][:WARM_ROWS], deadline + seconds, Counter())
    done: dict[int, Observation] = {}
    for i in order:
        # A batch or two say little: for the third, a trial may take half as long again.
        patience = seconds / 2 if len(done) < 3 else 0.0
        if done and time.monotonic() + _expected(done, work, i) > deadline + patience:
            break
        done[i] = _run(engine, batches[i], deadline + 2 * seconds, endings, samples)
    # Each batch stands for those that are nearest to it in the order of lengths.
    middle = np.cumsum(work) - work / 2
    ran = np.array(sorted(done))
    nearest = ran[np.abs(middle[:, None] - middle[ran]).argmin(1)]
    return [replace(done[i], times=float(work[nearest == i].sum() / work[i])) for i in ran.tolist()]


def _by_work(work: np.ndarray) -> list[int]:
    """All places, ordered so that any first few share the work evenly: the middle, then the quarters, and so on."""
    ends = np.cumsum(work)
    slots = 4 * len(work)
    first, *rest = spread(slots)
    targets = ((i + 0.5) / slots * ends[-1] for i in [*rest, first])
    return list(dict.fromkeys(int(np.searchsorted(ends, target)) for target in targets)) or [0]


def _expected(done: dict[int, Observation], work: np.ndarray, i: int) -> float:
    return sum(o.seconds for o in done.values()) / float(work[list(done)].sum()) * float(work[i])


def _streams(
    engine: EngineProcess, requests: list[Request], seconds: float, samples: int, endings: Counter[str]
) -> list[Observation]:
    order = np.random.default_rng(0).permutation(len(requests) // samples).tolist()

    def of(rows: list[int]) -> list[Request]:
        return [requests[row * samples + sample] for row in rows for sample in range(samples)]

    deadline = time.monotonic() + seconds
    done: list[Observation] = []
    size = FIRST_STREAM
    first = min(FIRST_STREAM, len(order) // 4)
    # As many as the first stream has: a GPU's kernels are compiled for a number of rows.
    if first:
        _run(engine, of(order[:first]), deadline + seconds, Counter())
    while first < len(order):
        now = time.monotonic()
        if done and now + 2 * done[-1].seconds > deadline:
            break
        some = of(order[first : first + size])
        done.append(_run(engine, some, deadline + 2 * seconds, endings, samples))
        first, size = first + size, 2 * size
    return _beyond(done)


def _beyond(streams: Sequence[Observation]) -> list[Observation]:
    """What the last stream that was twice as long took beyond the one before it; the last itself where that says
    nothing."""
    if len(streams) >= 2:
        longer, shorter = streams[-1], streams[-2]
        more = Observation(
            longer.rows - shorter.rows,
            longer.prompt_tokens - shorter.prompt_tokens,
            longer.output_tokens - shorter.output_tokens,
            longer.seconds - shorter.seconds,
        )
        if (
            more.rows >= shorter.rows / 2
            and more.seconds > 0
            and more.prompt_tokens > 0
            and more.output_tokens > 0
        ):
            return [more]
    return [max(streams, key=lambda o: o.rows)]


def _run(
    engine: EngineProcess, requests: list[Request], until: float, endings: Counter[str], samples: int = 1
) -> Observation:
    """All completions of these requests, or EngineError where they are not out in time; counts how they ended."""
    started = time.monotonic()
    outputs = 0
    scored = {request.id for request in requests if request.scored is not None}
    for completion in engine.generate(iter(requests)):
        if completion is not None:
            outputs += 0 if completion.id in scored else len(completion.token_ids)
            endings[completion.finish_reason] += 1
        elif time.monotonic() > until:
            raise EngineError(
                f"{len(requests)} rows were not finished in time",
                "plan --trial",
                "give it more time: --trial 10m",
            )
    prompt_tokens = sum(len(request.token_ids) for request in requests)
    rows = len(requests) if samples == 1 else len(requests) / samples
    return Observation(rows, prompt_tokens // samples, outputs, time.monotonic() - started)
