"""How long the rest of a run takes, from what rows have taken and the lengths of those to come."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchrun.telemetry.progress import Progress
from batchrun.telemetry.remaining_tokens import RemainingByTokens, thin_out

# Stretches of equal time that the work so far is cut into.
STRETCHES = 24
# Power of a prompt's length that a row's time grows with.
USUAL_POWER = 0.8
# Square of the spread of lengths (natural logarithms) below which the stretches tell little of it.
UNTOLD = 0.05
# Difference of lengths, likewise, up to which stretches say most of what is to come.
NEAR = 0.6
# Share of the work so far in which a new estimate takes the last one's place.
SMOOTHED = 0.1
# The most of its place that it takes with a single burst of rows.
AT_ONCE = 0.6


@dataclass(frozen=True, slots=True)
class _Point:
    """What was finished once generating workers had spent `busy` seconds in all: rows, and their prompts' tokens."""

    busy: float
    rows: int
    prompt: int


class Remaining:
    """Seconds that the rest takes: by tokens where engines tell what the rows have come to that they have begun, as a
    paged engine does, and else by the lengths of prompts."""

    def __init__(self) -> None:
        self._by_length, self._by_tokens = RemainingByLength(), RemainingByTokens()
        self._paged = False

    def add(self, now: Progress) -> None:
        """Takes in how far the run is now."""
        views = now.worker_views
        self._paged = self._paged or any(
            v.engine and "active_output_tokens" in v.engine.gauges for v in views
        )
        self._by_length.add(now)
        self._by_tokens.add(now)

    def seconds(self) -> float | None:
        """None before the first rows are through."""
        return (self._by_tokens if self._paged else self._by_length).seconds()


class RemainingByLength:
    """Seconds that the rest takes, kept as the busy seconds of all workers that the whole run comes to.

    A padded engine takes the longest rows of its window first and finishes them in bursts, so that rows per second tell
    nothing by themselves. Here the time of a row is a power of its prompt's length, fitted to what stretches of the
    run have taken, and the rows to come are as much shorter than those that are done as their tokens say: the mean
    prompt of all rows pulled is known early, as these come in the data's own order. Only moments at which rows finish
    count; in between the clock runs down.
    """

    def __init__(self) -> None:
        self._points: list[_Point] = []
        self._whole: float | None = None
        self._now: Progress | None = None

    def add(self, now: Progress) -> None:
        """Takes in the newest progress."""
        self._now = now
        # Where rows have limits of their own, these are part of their lengths.
        point = _Point(_busy(now), now.counts.rows, now.counts.prompt_tokens + now.counts.limits)
        # Rows that fail without a prompt are through at once, and tell nothing of the others.
        if len(self._points) < 2 and not now.counts.prompt_tokens:
            self._points = self._points or [point]
        elif not self._points or point.rows > self._points[-1].rows:
            self._points = self._points or [_Point(0.0, 0, 0)]
            if point.busy > self._points[-1].busy:
                thin_out(self._points)
                self._points.append(point)
                self._update(now)

    def seconds(self) -> float | None:
        """None before the first rows are through."""
        now = self._now
        if now is None or self._whole is None:
            return None
        if now.rows_done >= now.rows:
            return 0.0
        return max(0.0, self._whole - _busy(now)) / max(1, now.workers)

    def _update(self, now: Progress) -> None:
        first, before, last = self._points[0], self._points[-2], self._points[-1]
        whole = last.busy + self._left(now)
        known = self._whole or whole
        weight = min(AT_ONCE, (last.busy - before.busy) / (SMOOTHED * (last.busy - first.busy)))
        self._whole = known + weight * (whole - known)

    def _left(self, now: Progress) -> float:
        """Busy seconds of all rows that are not finished."""
        counts, done = now.counts, self._points[-1]
        left = now.rows - now.rows_done
        seconds, rows, prompt = np.diff(_stretches(self._points), axis=0).T
        lengths = np.maximum(prompt / rows, 1.0)
        mean = (counts.sent_tokens + counts.sent_limits) / max(1, counts.pulled)
        mean_left = max(1.0, (mean * (done.rows + left) - done.prompt) / max(1, left))
        power, level = _fit(np.log(lengths), np.log(seconds / rows), float(np.log(mean_left)))
        # The rows to come differ among themselves as those that are done did.
        alike = lengths * mean_left / (rows @ lengths / rows.sum())
        return left * float(rows @ np.exp(level + power * np.log(alike))) / float(rows.sum())


def _busy(now: Progress) -> float:
    return now.worker_time.get("generating", 0.0)


def _stretches(points: list[_Point]) -> NDArray[np.float64]:
    """(stretches + 1, 3) the points that are about equally far apart in busy time."""
    values = np.array([(point.busy, point.rows, point.prompt) for point in points], float)
    ends = np.linspace(values[0, 0], values[-1, 0], STRETCHES + 1)
    return values[np.unique(np.searchsorted(values[:, 0], ends - 1e-9))]


def _fit(lengths: NDArray[np.float64], times: NDArray[np.float64], length: float) -> tuple[float, float]:
    """Power and level of the line through the stretches, all in natural logarithms.

    The newest count most, for other programs come and go, and for the level those of rows about as long.
    """
    weights = np.linspace(0.2, 1.0, len(times))
    at, time = np.average(lengths, weights=weights), np.average(times, weights=weights)
    spread = np.average((lengths - at) ** 2, weights=weights)
    slope = np.average((lengths - at) * (times - time), weights=weights)
    power = float(np.clip((slope + UNTOLD * USUAL_POWER) / (spread + UNTOLD), 0.0, 2.0))
    weights /= 1 + ((lengths - length) / NEAR) ** 2
    return power, float(np.average(times - power * lengths, weights=weights))
