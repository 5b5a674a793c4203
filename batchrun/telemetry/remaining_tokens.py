"""How long the rest of a run on paged engines takes, from what tokens have taken and what rows have come to."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchrun.counters import Counters
from batchrun.engine.protocol import EngineStats
from batchrun.telemetry.progress import Progress, WorkerView

# Stretches of equal time that the work so far is cut into.
STRETCHES = 24
# Points that these are cut from.
MOST_POINTS = 2048
# What a token of an answer takes as a rule, in tokens of a prompt, and how much of that grows with the prompt's length.
ANSWER_TOKEN, GROWS_WITH_PROMPT = 8.0, 0.2
# The same on a CPU, which has as much to do for a token of an answer as for one of a prompt, or little more, and how
# much of both grows with the prompt's length.
CPU_ANSWER_TOKEN, CPU_GROWS = 2.0, 0.4
# Weight of these rules against what the stretches tell.
DOUBT = 0.05
# Of the time: what tokens of prompts take, those of answers, the latter as they grow, and the former as they do.
SHARES = np.array([(i, j, 20 - i - j, 0) for i in range(21) for j in range(21 - i)]) / 20
CPU_SHARES = np.array([(*t, 20 - sum(t)) for t in product(range(21), repeat=3) if sum(t) <= 20]) / 20
# How much answers grow with prompts as a rule, and the spread of prompts' lengths below which the rule says more.
USUAL_SLOPE, LITTLE_SPREAD = 0.25, 0.04
# The longest of the last answers, in mean answers: so many, and more with the logarithm of the rows that are left.
LONGEST, LONGER_OF_MORE = 1.8, 0.4
# Share of the work so far in which a new estimate takes the last one's place.
SMOOTHED = 0.1
# The most of its place that it takes with a single burst of rows.
AT_ONCE = 0.5
# Partitions per worker that are dealt out one by one at the end.
ONE_BY_ONE = 4


class RemainingByTokens:
    """Seconds that the rest takes.

    An engine takes the longest rows of its window first and finishes them in bursts, so that rows per second tell
    nothing by themselves. Here time goes by tokens: those of prompts, which are known of the rows in hand and follow
    the mean of all rows pulled for the others, and those of answers, whose lengths are learned from the rows that
    are done. Rows that a paged engine has begun count with what they have come to, since those that end first are
    the short ones; a batch that is half through counts with the time since the last one. The rest is dealt out to
    the workers as the driver does it, and the last one's time is what remains. On a CPU a token of an answer takes
    hardly more than one of a prompt, tokens of long prompts take longer than others, and steps of few rows are short.
    """

    def __init__(self) -> None:
        self._points = [_Point(0.0, 0, 0, 0, 0.0, 0.0, 0.0)]
        self._left: float | None = None
        self._now: Progress | None = None
        # Rows, in one engine.
        self._most_active = 0.0
        # By worker: what it had come to, and since when.
        self._changed: dict[str, tuple[object, float]] = {}

    def add(self, now: Progress) -> None:
        """Takes in how far the run is now."""
        before, self._now = self._now, now
        if self._left is not None and before is not None and _busy(now) > _busy(before):
            self._left = max(0.0, self._left - (now.seconds - before.seconds))
        pending = self._pending(now)
        samples = _samples(now.counts)
        active = _Active.of(now.worker_views, samples)
        each = (_Active.of([view], samples).rows for view in now.worker_views)
        self._most_active = max([self._most_active, *each])
        counts, last = now.counts, self._points[-1]
        # Rows that fail without a prompt are through at once, and tell nothing of the others.
        if not counts.prompt_tokens:
            return
        point = _Point(
            max(0.0, _busy(now) - sum(pending.values())),
            counts.rows,
            counts.prompt_tokens,
            counts.output_tokens,
            # An engine tells of the end of its rows a little before they are counted.
            max(last.begun_prompt, counts.prompt_tokens + active.prompt),
            max(last.begun_output, counts.output_tokens + active.output),
            max(last.begun_rows, counts.rows + active.rows),
        )
        grown = point.begun_prompt > last.begun_prompt or point.begun_output > last.begun_output
        if grown and point.busy > last.busy:
            thin_out(self._points)
            self._points.append(point)
            self._update(now, active, pending)

    def seconds(self) -> float | None:
        """None before the first rows are through."""
        if self._now is None or self._left is None:
            return None
        return 0.0 if self._now.rows_done >= self._now.rows else self._left

    def _pending(self, now: Progress) -> dict[str, float]:
        """Seconds by worker of work that has not come to anything yet: a batch that is half through."""
        before, self._changed = self._changed, {}
        for view in now.worker_views:
            engine = view.engine or EngineStats()
            state = (engine.completions, view.counts.rows, engine.gauges.get("active_output_tokens"))
            known = before.get(view.address)
            same = known is not None and known[0] == state and view.doing == "generating"
            self._changed[view.address] = known if known and same else (state, now.seconds)
        return {address: now.seconds - since for address, (_, since) in self._changed.items()}

    def _update(self, now: Progress, active: _Active, pending: dict[str, float]) -> None:
        before, last = self._points[-2:]
        new = self._estimate(now, active, pending)
        known = new if self._left is None else self._left
        self._left = known + min(AT_ONCE, (last.busy - before.busy) / (SMOOTHED * last.busy)) * (new - known)

    def _estimate(self, now: Progress, active: _Active, pending: dict[str, float]) -> float:
        stretches = _stretches(self._points)
        pace, answers = (
            _Pace.of(stretches, _is_cpu(now)),
            _Answers.of(stretches, active, now.counts).for_the_rest(now.counts),
        )
        mean = now.counts.sent_tokens / max(1, now.counts.pulled)
        loads, in_hand = [], 0
        for view in now.worker_views:
            counts = view.counts
            rows = max(0, view.rows - counts.reused - counts.rows)
            pulled = max(0, counts.pulled - counts.rows)
            prompt = max(0, counts.sent_tokens - counts.prompt_tokens) + mean * max(0, rows - pulled)
            load = self._load(rows, prompt, _Active.of([view], _samples(now.counts)), pace, answers)
            loads.append(max(0.0, load - pending[view.address]))
            in_hand += rows
        todo = max(0, now.rows - now.rows_done - in_hand)
        partitions = now.partitions - now.partitions_done - sum(view.tasks for view in now.worker_views)
        partitions = max(1, partitions) if todo else 0
        each = pace.seconds(mean * todo, answers.tokens(todo, mean), mean) / max(1, partitions)
        # Rows of a padded engine's tasks run together, and may end together: then one worker takes several at once.
        slots = max((view.slots for view in now.worker_views), default=1)
        together = 1 if active.rows else max(1, slots)
        ends = [_dealt_out(loads or [0.0], each, partitions, at_once) for at_once in (1, together)]
        return sum(ends) / len(ends)

    def _load(self, rows: int, prompt: float, active: _Active, pace: _Pace, answers: _Answers) -> float:
        """Seconds of one worker for `rows` rows of `prompt` tokens, of which some are begun."""
        waiting = max(0.0, rows - active.rows)
        prompt = max(0.0, prompt - active.prompt)
        length = prompt / waiting if waiting >= 1 else active.prompt / max(1.0, active.rows)
        seconds = pace.seconds(prompt, answers.tokens(waiting, length), length)
        if active.rows:
            # A CPU takes less time for a step of few rows; a GPU hardly does.
            slots = 0.0 if pace.is_cpu else max(self._most_active, active.rows)
            seconds += pace.last_rows(answers.of_last_rows(active, slots, length), length)
        return seconds


@dataclass(frozen=True, slots=True)
class _Point:
    """What generating workers have come to after `busy` seconds in all: finished rows and their tokens, the tokens of
    all rows that are begun, and how many these are."""

    busy: float
    rows: int
    prompt: int
    output: int
    begun_prompt: float
    begun_output: float
    begun_rows: float


@dataclass(frozen=True, slots=True)
class _Active:
    """Rows that paged engines have begun and not finished, and their tokens so far."""

    rows: float
    prompt: float
    output: float

    @classmethod
    def of(cls, views: Sequence[WorkerView], samples: float) -> _Active:
        gauges = [view.engine.gauges for view in views if view.engine]
        names = ("active_rows", "active_prompt_tokens", "active_output_tokens")
        rows, prompt, output = (sum(one.get(name, 0.0) for one in gauges) for name in names)
        return cls(rows / samples, prompt / samples, output)


@dataclass(frozen=True, slots=True)
class _Pace:
    """Seconds per token of prompts, per token of answers, per token of answers and token of its prompt, and per token
    of prompts and token of the same.

    The third one is a padded engine's, whose batches hold fewer rows the longer these are, and attention's; the last
    one attention's on a CPU. `uneven` is the mean of answer times prompt over the product of their means.
    """

    prompt: float
    output: float
    product: float
    square: float
    uneven: float
    is_cpu: bool

    @classmethod
    def of(cls, stretches: NDArray[np.float64], is_cpu: bool) -> _Pace:
        seconds, rows, prompts, _, prompt, output, begun = np.diff(stretches, axis=0).T
        mean = stretches[-1, 2] / stretches[-1, 1]
        lengths = np.where(rows > 0, prompts / np.maximum(rows, 1), mean)
        begun_lengths = np.where(begun > 0, prompt / np.maximum(begun, 1), mean)
        work = np.stack([prompt, output, output * lengths, prompt * begun_lengths])
        totals = np.maximum(1.0, work.sum(axis=1))
        shares, grows, each = SHARES, GROWS_WITH_PROMPT, ANSWER_TOKEN
        prompt_grows = 0.0
        if is_cpu:
            shares, grows, each, prompt_grows = CPU_SHARES, CPU_GROWS, CPU_ANSWER_TOKEN, CPU_GROWS
        usual = np.array([1 - prompt_grows, each * (1 - grows), each * grows, prompt_grows])
        usual *= totals[[0, 1, 1, 0]]
        # The newest count most, for other programs come and go.
        weights = np.linspace(0.2, 1.0, len(seconds))
        weights /= weights.sum()
        mixed = shares @ (work / totals[:, None])
        level = (weights @ seconds) / np.maximum(mixed @ weights, 1e-9)
        errors = ((seconds - level[:, None] * mixed) * len(seconds) / seconds.sum()) ** 2 @ weights
        far = ((shares - usual / usual.sum()) ** 2).sum(axis=1)
        best = int(np.argmin(errors + DOUBT * far))
        by_prompt, by_output, by_both, by_square = (level[best] * shares[best] / totals).tolist()
        uneven = float(totals[2] / totals[1] / max(1.0, mean))
        return cls(by_prompt, by_output, by_both, by_square, uneven, is_cpu)

    def seconds(self, prompt: float, output: float, length: float) -> float:
        growing = self.uneven * length
        return (self.prompt + self.square * growing) * prompt + (
            self.output + self.product * growing
        ) * output

    def last_rows(self, output: float, length: float) -> float:
        return (self.output + self.product * length) * output


@dataclass(frozen=True, slots=True)
class _Answers:
    """Expected lengths: `mean` after prompts of `prompt` tokens, of which the share `slope` grows with the prompt.

    `cut` is the share of rows that end by length, all alike.
    """

    mean: float
    prompt: float
    slope: float
    cut: float

    @classmethod
    def of(cls, stretches: NDArray[np.float64], active: _Active, counts: Counters) -> _Answers:
        _, rows, prompt, output = np.diff(stretches[:, :4], axis=0)[np.diff(stretches[:, 1]) > 0].T
        share = rows / rows.sum()
        lengths = prompt / rows * rows.sum() / max(1.0, prompt.sum()) - 1
        answers = output / rows * rows.sum() / max(1.0, output.sum()) - 1
        both = share @ (lengths * answers) + USUAL_SLOPE * LITTLE_SPREAD
        slope = float(np.clip(both / (share @ lengths**2 + LITTLE_SPREAD), 0.0, 1.0))
        cut = counts.finish_reasons.get("length", 0) / (counts.rows * _samples(counts))
        finished = counts.output_tokens / counts.rows
        # Rows that are begun are half through on average, whatever their lengths.
        begun = (counts.output_tokens + 2 * active.output) / (counts.rows + active.rows)
        without = counts.finish_reasons.get("error", 0) / _samples(counts)
        length = counts.prompt_tokens / max(1.0, counts.rows - without)
        return cls(cut * finished + (1 - cut) * begun, length, slope, cut)

    def for_the_rest(self, counts: Counters) -> _Answers:
        """The same for rows that are still to come, which have other limits of their own than those that are done."""
        left = counts.pulled - counts.rows
        if not counts.limits or left <= 0:
            return self
        done = counts.limits / counts.rows
        to_come = max(0.0, counts.sent_limits - counts.limits) / left
        return replace(self, mean=self.mean * to_come / done)

    def tokens(self, rows: float, length: float) -> float:
        """Of the answers of so many rows with prompts of `length` tokens."""
        return rows * self.mean * (1 - self.slope + self.slope * length / max(1.0, self.prompt))

    def of_last_rows(self, active: _Active, slots: float, length: float) -> float:
        """Tokens for which a full engine takes as long as until its last row ends, once none waits any more.

        A step of a few rows takes hardly less time than a step of `slots` rows; with 0 of them it takes its share.
        """
        alike = max(0.0, active.rows * self.mean - active.output)
        if not slots:
            return self.cut * alike + (1 - self.cut) * max(alike, active.output)
        longest = self.tokens(1, length) * (LONGEST + LONGER_OF_MORE * math.log1p(active.rows))
        return self.cut * alike + (1 - self.cut) * slots * longest


def _samples(counts: Counters) -> float:
    """Of each row: an engine counts every one as a row."""
    return 1 + counts.more_samples / max(1, counts.requests)


def _is_cpu(now: Progress) -> bool:
    return any(view.engine is not None and view.engine.device == "cpu" for view in now.worker_views)


def _busy(now: Progress) -> float:
    return now.worker_time.get("generating", 0.0)


def _dealt_out(loads: Sequence[float], each: float, partitions: int, at_once: int) -> float:
    """Seconds until the last worker is done, where whoever is first takes the next partitions, `at_once` of them."""
    last = min(partitions, ONE_BY_ONE * len(loads))
    level = (sum(loads) + each * (partitions - last)) / len(loads)
    heap = [max(level, load) if last < partitions else load for load in loads]
    heapq.heapify(heap)
    while last > 0:
        heapq.heapreplace(heap, heap[0] + min(at_once, last) * each)
        last -= at_once
    return max(heap)


def thin_out(points: list[Any]) -> None:
    """Every second one goes where there are MOST_POINTS, not the first and the last: a look at a run of days is to cost
    no more than one at a run of an hour."""
    if len(points) >= MOST_POINTS:
        del points[1:-1:2]


def _stretches(points: list[_Point]) -> NDArray[np.float64]:
    """(stretches + 1, 7) the points that are about equally far apart in busy time."""
    values = np.array(
        [(p.busy, p.rows, p.prompt, p.output, p.begun_prompt, p.begun_output, p.begun_rows) for p in points],
        float,
    )
    ends = np.linspace(values[0, 0], values[-1, 0], STRETCHES + 1)
    return values[np.unique(np.searchsorted(values[:, 0], ends - 1e-9))]
