"""The time and money that a run still takes are known once a fifth of it is done, whatever the lengths of its rows."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from simulated_run import ON_CPU, Rows, simulate

from batchrun.counters import Counters
from batchrun.engine.protocol import EngineStats
from batchrun.telemetry import remaining_tokens
from batchrun.telemetry.progress import Progress, WorkerView
from batchrun.telemetry.rates import Rates
from batchrun.telemetry.remaining import Remaining
from batchrun.telemetry.remaining_tokens import _Active, _Answers, _samples

PRICE = 2.0
RNG = np.random.default_rng(0)
SKEWED = np.clip(RNG.lognormal(4.5, 0.7, 16000), 5, 4000).astype(int)
TWO_KINDS = np.where(RNG.random(16000) < 0.1, 3000, 60)
FEW_TO_MANY = RNG.integers(50, 1500, 16000)
ANY = np.minimum(RNG.geometric(1 / 40, 16000), 96)
LONG = np.clip(RNG.lognormal(5, 0.8, 16000), 8, 1024).astype(int)
ALIKE = np.clip(SKEWED * RNG.uniform(0.1, 0.3, 16000), 1, 400).astype(int)
FIXED = np.full(16000, 64)
DATA = {
    "skewed prompts, any answers": Rows(SKEWED, ANY),
    "skewed prompts, long answers": Rows(SKEWED, LONG),
    "skewed prompts, answers cut by length": Rows(SKEWED, FIXED),
    "skewed prompts, answers as long as these": Rows(SKEWED, ALIKE),
    "two kinds of prompts": Rows(TWO_KINDS, ANY),
    "all alike": Rows(np.full(16000, 300), FIXED),
}
# Workers, partitions, tasks at once on a worker, rows. A window of an engine holds 2,048 rows.
SHAPES = [(1, 1, 2, 3000), (1, 3, 2, 8000), (2, 3, 2, 8000), (8, 8, 2, 16000), (8, 40, 2, 16000)]
RUNS = [(data, "paged", shape) for data in DATA for shape in SHAPES]
RUNS += [(data, "padded", (1, 3, 2, 8000)) for data in DATA]
RUNS += [(data, ON_CPU, (1, 3, 2, 3000)) for data in DATA if data != "two kinds of prompts"]
# Of each worker's only or first window, what is to come is unlike all that was seen by then: prompts of another kind,
# or answers that get shorter with their prompts. Half of the run tells.
SURPRISING = [("two kinds of prompts", "paged", shape) for shape in (SHAPES[0], SHAPES[3])]
SURPRISING += [("skewed prompts, answers as long as these", "paged", SHAPES[i]) for i in (0, 2, 3, 4)]
# A few answers of a thousand tokens run by themselves at the end, for a tenth of the run.
LONG_TAIL = ("skewed prompts, long answers", "paged", SHAPES[4])
# Of a run of 1,000 rows of the quickstart job, padded engine, one busy CPU core; each second: seconds, of them
# generating, rows, their prompt tokens, rows pulled, tokens sent.
QUICKSTART = Path(__file__).with_name("quickstart_run.json")


@cache
def run_of(data: str, engine: str, shape: tuple[int, int, int, int]) -> list[Progress]:
    workers, partitions, slots, rows = shape
    some = Rows(DATA[data].prompts[:rows], DATA[data].answers[:rows])
    return simulate(some, partitions, workers, slots, engine, window=2048)


def look(
    seconds: float, busy: float, rows: int, tokens: int, pulled: int, sent: int, planned: int
) -> Progress:
    counts = Counters(
        rows=rows, prompt_tokens=tokens, output_tokens=40 * rows, pulled=pulled, sent_tokens=sent
    )
    doing = "generating" if busy > 0 else "loading"
    return Progress(
        seconds=seconds, partitions=3, partitions_done=0, partitions_in_flight=2, rows=planned, rows_done=rows,
        counts=counts, workers=1, worker_time={"loading": seconds - max(0.0, busy), "generating": max(0.0, busy)},
        worker_views=[
            WorkerView(
                "tcp://10.0.0.1:9000", "10.0.0.1", 2, 2, 0, doing, EngineStats(completions=rows),
                rows=planned, counts=counts,
            )
        ],
    )  # fmt: skip


def quickstart() -> list[Progress]:
    return [look(*values, planned=1000) for values in json.loads(QUICKSTART.read_text())]


@dataclass
class Told:
    """From a share of a run on: the time left as it was told, as it was, and the money."""

    left: list[float]
    true: list[float]
    cost: list[float]
    seconds: float
    workers: int

    @classmethod
    def of(cls, seen: list[Progress], share: float = 0.2) -> Told:
        rates, told = Rates(), cls([], [], [], seen[-1].seconds, seen[-1].workers)
        for now in seen:
            rates.add(now)
            left, (_, cost) = rates.remaining(), rates.cost(PRICE)
            if (
                now.counts.rows
                and now.worker_time["generating"] >= share * seen[-1].worker_time["generating"]
            ):
                assert left is not None
                assert cost is not None
                told.left.append(left)
                told.true.append(told.seconds - now.seconds)
                told.cost.append(cost)
        return told

    @property
    def wrong(self) -> NDArray[np.float64]:
        return np.abs(np.array(self.left) - self.true)


def seen_of(run: tuple[str, str, tuple[int, int, int, int]] | None) -> list[Progress]:
    return quickstart() if run is None else run_of(*run)


@pytest.mark.parametrize("run", [None, *RUNS], ids=str)
def test_time_and_cost_of_the_whole_run_are_right_to_a_quarter(run):
    told = Told.of(seen_of(run), 0.5 if run in SURPRISING else 0.2)
    whole = PRICE * told.workers * told.seconds / 3600
    assert told.wrong.max() < 0.25 * told.seconds
    assert np.abs(np.array(told.cost) - whole).max() < 0.25 * whole
    assert told.left[-1] < 0.05 * told.seconds


@pytest.mark.parametrize("run", [run for run in RUNS if run not in [*SURPRISING, LONG_TAIL]], ids=str)
def test_once_a_fifth_is_done_the_time_left_is_right_to_a_quarter_of_itself(run):
    told = Told.of(seen_of(run))
    # Of the last tenth, to a quarter of all of it.
    enough = np.maximum(told.true, 0.1 * told.seconds)
    assert (told.wrong / enough).max() < 0.25


@pytest.mark.parametrize("run", [None, *RUNS], ids=str)
def test_the_time_left_never_jumps(run):
    told = Told.of(seen_of(run))
    ends = np.array(told.left) - told.true
    assert np.abs(np.diff(ends)).max() < (0.17 if run in SURPRISING else 0.12) * told.seconds


@pytest.mark.parametrize(
    "run", [("skewed prompts, long answers", engine, SHAPES[1]) for engine in ("paged", "padded")]
)
def test_a_run_of_days_remembers_no_more_than_one_of_an_hour_and_is_told_as_well(run, monkeypatch):
    whole = Told.of(seen_of(run))
    monkeypatch.setattr(remaining_tokens, "MOST_POINTS", 64)
    remaining = Remaining()
    for now in seen_of(run):
        remaining.add(now)
        assert max(len(way._points) for way in (remaining._by_length, remaining._by_tokens)) <= 64
    assert len(seen_of(run)) > 4 * 64
    few = Told.of(seen_of(run))
    assert np.abs(np.array(few.left) - whole.left).max() < 0.05 * whole.seconds


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


def test_rows_to_come_are_counted_with_their_own_limits():
    known = _Answers(mean=100.0, prompt=50.0, slope=0.0, cut=0.5)
    same = Counters(rows=50, pulled=100)
    assert known.for_the_rest(same) is known
    # Those that are done might generate 200 tokens, the others 20.
    own = Counters(rows=50, pulled=100, limits=50 * 200, sent_limits=50 * 200 + 50 * 20)
    assert known.for_the_rest(own).tokens(10, 50.0) == pytest.approx(100.0)


def test_the_samples_that_an_engine_holds_are_rows_only_together():
    engine = EngineStats(gauges={"active_rows": 80, "active_prompt_tokens": 800, "active_output_tokens": 400})
    view = WorkerView("a", "h", 1, 1, 0, "generating", engine)
    samples = _samples(Counters(requests=10, more_samples=70))
    assert samples == 8
    assert _Active.of([view], samples) == _Active(10, 100, 400)
    assert _samples(Counters()) == 1


@pytest.mark.parametrize("paged", [True, False])
def test_rows_that_failed_without_a_prompt_do_not_stretch_the_time_left(paged):
    told = Remaining()
    for second in range(31):
        # 40 rows fail at once; from the tenth second on one of 300 tokens ends in each.
        done = max(0, second - 10)
        active = {
            "active_rows": 20.0,
            "active_prompt_tokens": 6000.0,
            "active_output_tokens": 20.0 * min(second, 10),
        }
        counts = Counters(
            rows=40 + done, failed=40, prompt_tokens=300 * done, output_tokens=40 * done, pulled=100,
            requests=60, sent_tokens=18000, finish_reasons={"error": 40, "stop": done},
        )  # fmt: skip
        engine = EngineStats(completions=done, device="cpu", gauges=active if paged else {})
        view = WorkerView("a", "h", 1, 1, 0, "generating", engine, rows=100, counts=counts)
        told.add(
            Progress(
                seconds=float(second), partitions=1, partitions_done=0, partitions_in_flight=1, rows=100,
                rows_done=counts.rows, counts=counts, workers=1, worker_time={"generating": float(second)},
                worker_views=[view],
            )
        )  # fmt: skip
        left = told.seconds()
        assert left is None or done > 0
        assert left is None or left < 700
    # 40 rows are left, at 20 rows in 30 seconds.
    assert left == pytest.approx(60, rel=0.5)
