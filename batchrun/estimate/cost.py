"""From timed stretches of generation to hours and money, each with an interval.

The model: seconds = start + a * prompt tokens + b * output tokens, divided over the workers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

DRAWS = 400
# Percentiles of the draws: a 90% interval.
LOW, HIGH = 5, 95
# What an output token may cost, in prompt tokens, where one figure for both is all that is known: the interval covers
# both ends. One H200 was read at about 10 for a 0.6b shape: 428,000 prompt tokens/s, 24 ms for a step of 1,024 rows.
WORTH = (1.0, 30.0)
# The spread between readings that is taken for granted where there are too few to see it.
UNSEEN = 0.1


@dataclass(frozen=True, slots=True)
class Observation:
    """A stretch of one engine's work: what it was given, what it made of it, in how many seconds.

    It stands for `times` such stretches among those observed together.
    """

    rows: float
    prompt_tokens: int
    output_tokens: int
    seconds: float
    times: float = 1.0


@dataclass(frozen=True, slots=True)
class Throughput:
    """What is known of a model on a machine. `source` says where from, to a person.

    `own_rows` is true where the observations are of rows of the very job, so that its output lengths are known;
    `start_seconds` is from the start of a run to the first row that is generated, 0 where nothing is known of it.
    `gpus` are those of the engine.
    """

    source: str
    engine: str
    device: str
    observations: list[Observation]
    own_rows: bool
    start_seconds: float = 0.0
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class Range:
    """A figure and its 90% interval."""

    low: float
    likely: float
    high: float

    def times(self, factor: float) -> Range:
        """The range scaled."""
        return Range(self.low * factor, self.likely * factor, self.high * factor)

    def plus(self, other: float) -> Range:
        """The range moved."""
        return Range(self.low + other, self.likely + other, self.high + other)


@dataclass(frozen=True, slots=True)
class Estimate:
    """What the rest of a job takes: `seconds` of wall time on so many workers, each with `gpus_per_worker`, hours of
    them and of their GPUs, and money.

    `output_bound` tells that the answers' lengths are not known and every one was taken as long as it may be.
    """

    workers: int
    gpus_per_worker: int
    seconds: Range
    worker_hours: Range
    cost: Range | None
    output_tokens: Range
    output_bound: bool
    source: str

    @property
    def gpu_hours(self) -> Range:
        """Hours of all workers' GPUs."""
        return self.worker_hours.times(self.gpus_per_worker)

    def to_json(self) -> dict[str, Any]:
        """Plain values, six digits of each."""

        def plain(figures: Range | None) -> dict[str, float] | None:
            if figures is None:
                return None
            return {name: float(f"{getattr(figures, name):.6g}") for name in ("low", "likely", "high")}

        return {
            "workers": self.workers,
            "gpus_per_worker": self.gpus_per_worker,
            "seconds": plain(self.seconds),
            "worker_hours": plain(self.worker_hours),
            "gpu_hours": plain(self.gpu_hours),
            "cost": plain(self.cost),
            "output_tokens": plain(self.output_tokens),
            "output_bound": self.output_bound,
            "source": self.source,
        }


def fit(observations: Sequence[Observation], worth: float | None = None) -> tuple[float, float]:
    """Seconds for a prompt token and for an output token, neither below zero.

    Least squares, each observation weighted as if its variance grew with its seconds, then scaled so that the
    seconds of all that the observations stand for add up. With `worth`, an output token is taken to cost so many
    prompt tokens: that is all that one observation allows.
    """
    given, seconds, times = _columns(observations)
    weights = np.sqrt(times / np.maximum(seconds, 1e-9))
    a, b = (1.0, worth) if worth is not None else _ratio(given * weights[:, None], seconds * weights)
    expected = float(times @ given @ [a, b])
    scale = float(times @ seconds) / expected if expected > 0 else 0.0
    return a * scale, b * scale


def estimate(
    known: Throughput,
    lengths: NDArray[np.int64],
    runs: NDArray[np.int64],
    rows: float,
    max_new_tokens: float,
    workers: int,
    partitions: int,
    price: float | None = None,
    seed: int = 0,
) -> Estimate:
    """The rest of a job: `rows` rows with a prompt, in `partitions` partitions, on `workers` workers.

    Args:
        lengths: (sampled,) prompt tokens of sampled rows, each standing for rows / sampled of the job.
        runs: (sampled,) the place that each was sampled from: places are what the bootstrap draws.
        max_new_tokens: of a row, on average.
        price: of one worker's hour.

    The interval is a bootstrap's (Efron 1979): places of the sample are drawn anew, and so are the residuals of the
    observations about the fit. Where the observations cannot tell prompt from output, it also spans `WORTH`.
    """
    rng = np.random.default_rng(seed)
    seen = known.observations
    worths: list[float | None] = [None] if _tells_apart(seen) else [*WORTH]
    likely = fit(seen, None if worths == [None] else math.sqrt(math.prod(WORTH)))
    places = _sums_by_run(lengths, runs)
    bound = None if known.own_rows else float(max_new_tokens)
    outputs = [rows * (_mean_output(seen) if bound is None else bound)]
    work = [_work(likely, rows * lengths.mean() if len(lengths) else 0.0, outputs[0])]
    for _ in range(DRAWS if len(places) else 0):
        tokens, sampled = places[rng.integers(0, len(places), len(places))].sum(0)
        drawn = [seen[i] for i in rng.integers(0, len(seen), len(seen))]
        outputs.append(rows * (_mean_output(drawn) if bound is None else bound))
        again = _with_drawn_residuals(seen, likely, rng)
        work += [_work(fit(again, worth), rows * tokens / sampled, outputs[-1]) for worth in worths]
    # The last partitions do not share out evenly: one worker has this many of them, the others wait for it.
    uneven = math.ceil(partitions / workers) / partitions if partitions else 1 / workers
    seconds = _range(work).times(uneven).plus(known.start_seconds if rows else 0.0)
    hours = seconds.times(workers / 3600)
    return Estimate(
        workers=workers,
        gpus_per_worker=known.gpus,
        seconds=seconds,
        worker_hours=hours,
        cost=None if price is None else hours.times(known.gpus * price),
        output_tokens=_range(outputs),
        output_bound=not known.own_rows,
        source=known.source,
    )


def _ratio(given: NDArray[np.float64], seconds: NDArray[np.float64]) -> tuple[float, float]:
    """Least squares of two coefficients that are not negative: the best of both and of either alone."""
    both = np.linalg.lstsq(given, seconds, rcond=None)[0]
    if (both >= 0).all():
        return float(both[0]), float(both[1])
    squares = (given**2).sum(0)
    alone = np.maximum(0.0, given.T @ seconds) / np.maximum(squares, 1e-300)
    gain = alone**2 * squares
    return (float(alone[0]), 0.0) if gain[0] >= gain[1] else (0.0, float(alone[1]))


def _tells_apart(observations: Sequence[Observation]) -> bool:
    """Whether prompt and output tokens stand in different proportions in the observations."""
    shares = [o.prompt_tokens / max(1, o.prompt_tokens + o.output_tokens) for o in observations]
    return len(shares) >= 2 and max(shares) - min(shares) > 0.05


def _mean_output(observations: Sequence[Observation]) -> float:
    """Output tokens of a row."""
    rows = sum(o.times * o.rows for o in observations)
    return sum(o.times * o.output_tokens for o in observations) / rows if rows else 0.0


def _with_drawn_residuals(
    observations: Sequence[Observation], likely: tuple[float, float], rng: np.random.Generator
) -> list[Observation]:
    """The fit's own seconds, each times a relative residual drawn from all of them."""
    given, seconds, _ = _columns(observations)
    fitted = given @ likely
    # The fit goes through both, and leaves nothing to judge it by.
    if len(seconds) < 3:
        drawn = np.maximum(0.0, rng.normal(1.0, UNSEEN, len(seconds)))
        return [replace(o, seconds=float(s)) for o, s in zip(observations, fitted * drawn, strict=True)]
    residuals = seconds / np.maximum(fitted, 1e-12) - 1
    # Two coefficients were fitted, which leaves residuals smaller than the errors.
    residuals *= math.sqrt(len(seconds) / max(1, len(seconds) - 2))
    drawn = np.maximum(0.0, 1 + residuals[rng.integers(0, len(seconds), len(seconds))])
    return [replace(o, seconds=float(s)) for o, s in zip(observations, fitted * drawn, strict=True)]


def _columns(observations: Sequence[Observation]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """(n, 2) prompt and output tokens, (n,) seconds, (n,) times."""
    rows = [(o.prompt_tokens, o.output_tokens, o.seconds, o.times) for o in observations]
    values = np.array(rows, float).reshape(-1, 4)
    return values[:, :2], values[:, 2], values[:, 3]


def _work(coefficients: tuple[float, float], prompt_tokens: float, output_tokens: float) -> float:
    return float(coefficients[0] * prompt_tokens + coefficients[1] * output_tokens)


def _sums_by_run(lengths: NDArray[np.int64], runs: NDArray[np.int64]) -> NDArray[np.float64]:
    """(places, 2) prompt tokens and rows of each place."""
    if not len(lengths):
        return np.zeros((0, 2))
    _, place = np.unique(runs, return_inverse=True)
    return np.stack([np.bincount(place, lengths), np.bincount(place)], 1).astype(float)


def _range(draws: Sequence[float]) -> Range:
    """The first of the draws is the likely one."""
    low, high = np.percentile(draws, [LOW, HIGH])
    return Range(float(min(low, draws[0])), float(draws[0]), float(max(high, draws[0])))
