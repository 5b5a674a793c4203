"""The time and money that a run still takes are known once a fifth of it is done, whatever the lengths of its rows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from batchrun.counters import Counters
from batchrun.telemetry.progress import Progress, Rates, WorkerView

LOAD = 10.0  # seconds before the first row
PRICE = 2.0
RNG = np.random.default_rng(0)
SKEWED = np.clip(RNG.lognormal(4.5, 0.7, 20000), 5, 4000).astype(int)
TWO_KINDS = np.where(RNG.random(20000) < 0.1, 3000, 60)
ANY = np.minimum(RNG.geometric(1 / 40, 20000), 96)
ALIKE = np.clip(SKEWED * RNG.uniform(0.1, 0.3, 20000), 1, 400).astype(int)
# Of a run of 1,000 rows of the quickstart job, padded engine, one busy CPU core; each second: seconds, of them
# generating, rows, their prompt tokens, rows pulled, tokens sent.
QUICKSTART = Path(__file__).with_name("quickstart_run.json")

Work = Iterator[tuple[float, int, int, int]]  # when, rows, prompt tokens and rows pulled by then


def padded(prompts: NDArray[np.int_], answers: NDArray[np.int_], window: int = 8192) -> Work:
    """Batches of 16,384 padded tokens, the longest rows of a window first, that all finish at once."""
    when, rows, tokens = LOAD, 0, 0
    for first in range(0, len(prompts), window):
        order = first + np.argsort(-prompts[first : first + window], kind="stable")
        while len(order):
            batch = order[: max(1, 16384 // (prompts[order[0]] + 96))]
            order = order[len(batch) :]
            when += 1e-4 * len(batch) * prompts[batch[0]] + answers[batch].max() * (5e-3 + 2e-4 * len(batch))
            rows, tokens = rows + len(batch), tokens + int(prompts[batch].sum())
            yield when, rows, tokens, min(len(prompts), first + 2 * window)


def paged(
    prompts: NDArray[np.int_], answers: NDArray[np.int_], active: int = 256, window: int = 16384
) -> Work:
    """So many rows decode at once, and the next ones take the places of those that finish."""
    starts = range(0, len(prompts), window)
    order = np.concatenate([s + np.argsort(-prompts[s : s + window], kind="stable") for s in starts])
    now, left = order[:0], answers[:0]
    when, rows, tokens = LOAD, 0, 0
    while len(now) or len(order):
        new, order = order[: active - len(now)], order[active - len(now) :]
        now, left = np.concatenate([now, new]), np.concatenate([left, answers[new]]) - 8
        when += 1e-5 * prompts[new].sum() + 8 * (0.02 + 2e-5 * len(now))
        rows, tokens = rows + int((left <= 0).sum()), tokens + int(prompts[now[left <= 0]].sum())
        now, left = now[left > 0], left[left > 0]
        yield when, rows, tokens, len(prompts)


def looks(prompts: NDArray[np.int_], work: Work) -> list[Progress]:
    """What the driver sees of it, each second."""
    frames = list(work)
    ends = [when for when, *_ in frames]
    sent = np.concatenate([[0], np.cumsum(prompts)])
    seen = []
    for second in np.arange(1.0, ends[-1] + 1):
        done = int(np.searchsorted(ends, second, side="right"))
        _, rows, tokens, pulled = frames[done - 1] if done else (0, 0, 0, frames[0][3])
        seen.append(look(second, second - LOAD, rows, tokens, pulled, int(sent[pulled]), len(prompts)))
    return seen


def look(
    seconds: float, busy: float, rows: int, tokens: int, pulled: int, sent: int, planned: int
) -> Progress:
    counts = Counters(rows=rows, prompt_tokens=tokens, output_tokens=rows, pulled=pulled, sent_tokens=sent)
    doing = "generating" if busy > 0 else "loading"
    return Progress(
        seconds=seconds, partitions=3, partitions_done=0, partitions_in_flight=2, rows=planned, rows_done=rows,
        counts=counts, workers=1, worker_time={"loading": seconds - max(0.0, busy), "generating": max(0.0, busy)},
        worker_views=[WorkerView("tcp://10.0.0.1:9000", "10.0.0.1", 2, 2, 0, doing)],
    )  # fmt: skip


def quickstart() -> list[Progress]:
    return [look(*values, planned=1000) for values in json.loads(QUICKSTART.read_text())]


@dataclass
class Told:
    """Of the second and later fifths of a run: the time left as it was told, as it was, and the money."""

    left: list[float]
    true: list[float]
    cost: list[float]
    seconds: float

    @classmethod
    def of(cls, seen: list[Progress]) -> Told:
        rates, told = Rates(), cls([], [], [], seen[-1].seconds)
        for now in seen:
            rates.add(now)
            left, (_, cost) = rates.remaining(), rates.cost(PRICE)
            if now.worker_time["generating"] >= 0.2 * seen[-1].worker_time["generating"]:
                assert left is not None
                assert cost is not None
                told.left.append(left)
                told.true.append(told.seconds - now.seconds)
                told.cost.append(cost)
        return told

    @property
    def wrong(self) -> NDArray[np.float64]:
        return np.abs(np.array(self.left) - self.true)


RUNS = {
    "skewed lengths, any answers": lambda: looks(SKEWED, padded(SKEWED, ANY)),
    "skewed lengths, answers alike": lambda: looks(SKEWED, padded(SKEWED, ALIKE)),
    "two kinds of rows": lambda: looks(TWO_KINDS, padded(TWO_KINDS, ANY)),
    "paged": lambda: looks(SKEWED, paged(SKEWED, 4 * ALIKE)),
    "paged, any answers": lambda: looks(SKEWED, paged(SKEWED, 4 * ANY)),
    "one window": lambda: looks(SKEWED[:2000], padded(SKEWED[:2000], ALIKE[:2000])),
    "the quickstart": quickstart,
}


@pytest.mark.parametrize("name", RUNS)
def test_once_a_fifth_is_done_time_and_cost_of_the_whole_run_are_right_to_a_quarter(name):
    seen = RUNS[name]()
    told = Told.of(seen)
    assert told.wrong.max() < 0.25 * told.seconds
    whole = PRICE * told.seconds / 3600
    assert np.abs(np.array(told.cost) - whole).max() < 0.25 * whole
    assert told.left[-1] < 0.05 * told.seconds


@pytest.mark.parametrize(
    "name", ["skewed lengths, any answers", "skewed lengths, answers alike", "two kinds of rows"]
)
def test_over_several_windows_the_time_left_is_right_to_a_quarter_of_itself(name):
    told = Told.of(RUNS[name]())
    some = np.array(told.true) > 0.1 * told.seconds
    assert (told.wrong[some] / np.array(told.true)[some]).max() < 0.25


@pytest.mark.parametrize("name", RUNS)
def test_the_time_left_never_jumps(name):
    told = Told.of(RUNS[name]())
    ends = np.array(told.left) - told.true
    assert np.abs(np.diff(ends)).max() < 0.12 * told.seconds


def test_nothing_is_told_before_the_first_row_is_through():
    rates = Rates()
    rates.add(look(5.0, -5.0, 0, 0, 0, 0, 100))
    rates.add(look(15.0, 5.0, 0, 0, 100, 5000, 100))
    assert rates.remaining() is None
    assert rates.cost(PRICE) == (pytest.approx(PRICE * 15 / 3600), None)


def test_a_complete_run_has_nothing_left():
    rates = Rates()
    for now in (look(15.0, 5.0, 0, 0, 100, 5000, 100), look(25.0, 15.0, 100, 5000, 100, 5000, 100)):
        rates.add(now)
    assert rates.remaining() == 0.0
