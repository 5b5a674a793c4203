"""Captured decode steps on a CPU: a stand-in for a CUDA graph that, like one, only knows the memory of its capture."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch

from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.device import last_layer
from batchrun.engine.paged.device.graphs import DecodeGraphs
from batchrun.engine.paged.device.memory import Budget
from batchrun.engine.paged.device.shapes import query_spans, round_tokens
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.engine.weights.loading import load_model


class Recorded:
    """Replays a step over the cache memory of its capture, whatever the cache's memory is by then."""

    def __init__(self, engine: PagedEngine, step: Callable[[], None]) -> None:
        self.cache, self.step = engine._runner.cache, step
        self.memory = self.cache.memory

    def replay(self) -> None:
        now, self.cache.memory = self.cache.memory, self.memory
        try:
            self.step()
        finally:
            self.cache.memory = now


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.make_model("llama", tmp_path)


def _engine(folder: Path, monkeypatch: pytest.MonkeyPatch, capturing: bool) -> PagedEngine:
    spec = EngineSpec("paged", str(folder), str(folder), max_context=tiny_models.MAX_CONTEXT)
    engine = PagedEngine(spec, load_model(spec), page_size=16)
    engine._runner._use_graphs = capturing
    monkeypatch.setattr(DecodeGraphs, "_capture", lambda _, step: Recorded(engine, step))
    return engine


def _answers(engine: PagedEngine, seed: int, rows: int = 20) -> dict[int, list[int]]:
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(3, 259, rng.integers(1, 60)).astype(np.int32) for _ in range(rows)]
    requests = (Request(number, prompt, 12, number) for number, prompt in enumerate(prompts))
    return {one.id: one.token_ids.tolist() for one in engine.generate(requests)}


def test_a_captured_step_is_not_used_once_the_memory_it_was_captured_over_is_replaced(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _answers(_engine(folder, monkeypatch, capturing=False), seed=1)
    engine = _engine(folder, monkeypatch, capturing=True)
    _answers(engine, seed=0)
    pages = engine._runner.cache.memory.shape[2]
    engine._runner.cache.allocate(pages)
    assert _answers(engine, seed=1) == expected


def test_the_step_captured_to_measure_memory_is_not_used_afterwards(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an engine starts: the largest step is captured while the cache is a single page."""
    expected = _answers(_engine(folder, monkeypatch, capturing=False), seed=1, rows=64)
    # Rows of any number use the widest step met so far, here that of the warm-up.
    monkeypatch.setattr("batchrun.engine.paged.device.runner.NARROW_BATCH", 0)
    engine = _engine(folder, monkeypatch, capturing=True)
    runner = engine._runner
    pages = runner.cache.memory.shape[2]
    runner.cache.allocate(1)
    runner.warm_up(prefill_tokens=64)
    runner.cache.allocate(pages)
    runner._max_pages = runner._largest_shape.pages
    assert _answers(engine, seed=1, rows=64) == expected


def test_running_out_of_memory_in_a_capture_leaves_no_graph_and_loses_no_row(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _answers(_engine(folder, monkeypatch, capturing=False), seed=1)
    engine = _engine(folder, monkeypatch, capturing=True)
    captured: list[Recorded] = []

    def capture(_: DecodeGraphs, step: Callable[[], None]) -> Recorded:
        captured.append(Recorded(engine, step))
        if len(captured) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return captured[-1]

    monkeypatch.setattr(DecodeGraphs, "_capture", capture)
    assert _answers(engine, seed=1) == expected
    assert any("out of memory" in note for note in engine.stats.notes)


def test_packs_have_few_different_numbers_of_tokens() -> None:
    """A number that products have not met before costs the host time in every prefill of a run over new rows."""
    numbers = {tokens: round_tokens(tokens) for tokens in range(1, 16385)}
    assert all(tokens <= made < tokens * 1.04 + 8 for tokens, made in numbers.items())
    assert len({made for tokens, made in numbers.items() if tokens > 8192}) == 32
    assert numbers[16384] == 16384


def test_documents_and_short_questions_are_computed_in_grids_of_their_own() -> None:
    assert query_spans([4000, 2048, 600, 128, 127, 9, 300]) == [(0, 2, 4000), (2, 4, 600), (4, 7, 300)]
    assert query_spans([600, 600, 8]) == [(0, 3, 600)]
    assert query_spans([3, 0]) == [(0, 2, 3)]


def test_one_trace_of_a_layer_serves_warm_up_prefills_and_decode_steps(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each takes two seconds of a start, whatever of the compiled code is found again on the disk."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    budget = replace(Budget.of({}, torch.device("cpu")), compile=True)
    monkeypatch.setattr(Budget, "of", lambda *_: budget)
    traced = torch._dynamo.utils.counters["stats"]
    torch._dynamo.reset()
    before = traced["unique_graphs"]
    engine = _engine(folder, monkeypatch, capturing=True)
    engine._runner.warm_up(256)
    assert len(_answers(engine, seed=1)) == 20
    assert traced["unique_graphs"] - before == 1
    # A run that lasts gets its last layer compiled as well.
    monkeypatch.setattr(last_layer, "COMPILED_FROM", 0)
    assert len(_answers(engine, seed=1)) == 20
    assert traced["unique_graphs"] - before == 2


def test_a_small_model_gets_larger_prefill_batches_unless_the_job_says_otherwise(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("batchrun.engine.paged.attention.devices.is_gpu", lambda device: True)
    device = torch.device("cpu")
    assert Budget.of({}, device, 600_000_000).prefill_tokens == 32768
    assert Budget.of({}, device, 8_000_000_000).prefill_tokens == 16384
    assert Budget.of({"prefill_tokens": 4096}, device, 600_000_000).prefill_tokens == 4096
