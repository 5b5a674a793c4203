"""Real rows through the paged engine on a GPU: more of them at once than any benchmark has, the widest among them."""

from __future__ import annotations

import collections
import functools
import time

import numpy as np
import pytest
import real_rows
import torch

from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import EngineSpec, Request, Sampling

pytestmark = pytest.mark.gpu
NEW = 32
Answers = dict[int, np.ndarray]


@functools.cache
def _prompts(rows: int) -> list[np.ndarray]:
    return real_rows.prompts(rows)


def _engine(shape: dict[str, object], stops: tuple[int, ...] = (), **changes: object) -> PagedEngine:
    sampling = Sampling(**{name: changes.pop(name) for name in list(changes) if hasattr(Sampling, name)})  # type: ignore[arg-type]
    # Room for the other files' engines, which run beside this one.
    changes = {"memory_fraction": 0.6} | changes
    spec = EngineSpec(
        "paged", "", "", dtype="bfloat16", device="cuda", max_context=real_rows.MAX_CONTEXT, sampling=sampling,
        stop_token_ids=stops, options=changes,
    )  # fmt: skip
    return PagedEngine(spec, real_rows.model(shape))


def _turn(
    engine: PagedEngine,
    rows: int,
    shift: int = 0,
    at_once: int = 0,
    new: int = NEW,
    longest: int = real_rows.MAX_CONTEXT,
) -> Answers:
    """Every row's tokens; each comes back once, and afterwards no page is held. `shift` makes other prompts; `at_once`
    rows at least were active together; prompts are cut at `longest` tokens."""
    started, got, reasons = time.perf_counter(), {}, collections.Counter[str]()
    vocabulary = engine._runner._model.config.vocab_size
    prompts = [prompt[:longest] for prompt in _prompts(rows)]
    requests = (Request(i, (p + shift) % vocabulary, new, i) for i, p in enumerate(prompts))
    most = 0
    for one in engine.generate(requests):
        assert one.id not in got
        assert one.fault is None
        got[one.id] = one.token_ids
        reasons[one.finish_reason] += 1
        most = max(most, engine.stats.gauges.get("active_rows", 0))
    engine._scheduler.check()
    assert len(got) == rows
    seconds = time.perf_counter() - started
    gauges = {"preemptions": engine.stats.gauges["preemptions"], "shared_tokens": engine.stats.shared_tokens}
    assert not engine.stats.notes, f"run this without other programs on the card: {engine.stats.notes}"
    assert most >= at_once
    print(f"{rows} rows, {seconds:.1f} s, {dict(reasons)}, at most {most} at once, {gauges}", flush=True)
    return got


def _equal(first: Answers, second: Answers) -> float:
    return float(np.mean([np.array_equal(first[i], second[i]) for i in first]))


def test_every_row_comes_back_whole_and_the_same_twice() -> None:
    engine = _engine(real_rows.LARGE)
    print(torch.cuda.get_device_name(), engine.stats.attention, engine.stats.gauges)
    # As many as there is room for, which is less where others are on the card.
    at_once = min(1000, int(engine.stats.gauges["pool_tokens"]) // 750)
    # An H100 of 80 GB that is shared has room for 492.
    assert at_once > 400, "the card is taken: run this without other programs on it"
    turns = [_turn(engine, 20_000, shift, at_once) for shift in (0, 1, 0)]
    assert all(len(tokens) == NEW for turn in turns for tokens in turn.values())
    assert _equal(turns[0], turns[2]) >= 0.999
    assert engine.stats.shared_tokens > 0


def test_a_pool_too_small_for_the_rows_at_once_preempts_and_loses_none() -> None:
    # A stop token that hardly comes: the engine does not know how long answers get, and expects half of each. The
    # first hundred rows, cut to one length, then need a third page each where two were expected.
    engine = _engine(real_rows.LARGE, stops=(3,), cache_tokens=60_000)
    got = _turn(engine, 4_000, new=64, longest=460)
    assert engine.stats.gauges["preemptions"] > 0
    large = _engine(real_rows.LARGE, stops=(3,))
    equal = _equal(got, _turn(large, 4_000, new=64, longest=460))
    print(f"{equal:.3f} of the rows are the same in a pool for all", flush=True)
    assert equal > 0.7


@pytest.mark.parametrize(
    "sampling",
    [
        {"temperature": 0.9, "top_p": 0.9, "seed": 7},
        {"temperature": 0.7, "top_k": 40, "min_p": 0.02},
        {"repetition_penalty": 1.2},
    ],
    ids=["top-p", "top-k and min-p", "repetition penalty"],
)
def test_sampled_rows_come_back_whole_and_the_same_twice(sampling: dict[str, object]) -> None:
    engine = _engine(real_rows.SMALL, stops=(3, 5), cache_tokens=1_000_000, **sampling)
    # Below this many rows a step that was captured for more would never be used.
    first = _turn(engine, 4_000, at_once=1921)
    assert all(0 < len(tokens) <= NEW for tokens in first.values())
    assert all(len(tokens) == NEW or tokens[-1] in (3, 5) for tokens in first.values())
    _turn(engine, 4_000, shift=1)
    assert _equal(first, _turn(engine, 4_000)) > 0.9
