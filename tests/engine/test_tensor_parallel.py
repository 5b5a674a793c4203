"""One engine over several ranks, on a CPU in float32: the same tokens as one alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import forked_programs
import numpy as np
import pytest
import tiny_models
import tp_models

from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.attention.architecture import Unsupported
from batchrun.engine.paged.parallel.ranks import Ranks
from batchrun.engine.paged.parallel.share import load_share
from batchrun.engine.protocol import Completion, EngineSpec, Request, Sampling, Scored
from batchrun.engine.weights.loading import load_model

PAGE = 16
NEVER = 10**6  # a stop token that no model has: the engine then learns how long answers are, and preempts


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tp_models.make_model(name, root / name) for name in tp_models.CONFIGS}


@pytest.fixture(autouse=True)
def forked(monkeypatch: pytest.MonkeyPatch) -> None:
    forked_programs.use(monkeypatch)


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    options = {"max_rows": 8, "prefill_tokens": 60, "decode_steps": 4, "cache_tokens": 320}
    changes = {
        "max_context": tiny_models.MAX_CONTEXT,
        "options": options,
        "stop_token_ids": (NEVER,),
        **changes,
    }
    return EngineSpec("paged", str(folder), str(folder), **changes)


@contextmanager
def _engine(spec: EngineSpec) -> Iterator[PagedEngine]:
    if spec.gpus == 1:
        yield PagedEngine(spec, load_model(spec), page_size=PAGE)
        return
    ranks = Ranks(spec, PAGE)
    try:
        yield PagedEngine(spec, load_share(spec, ranks.group), PAGE, ranks)
    finally:
        ranks.close()


def _requests(rows: int = 20, prefix: int = 37) -> list[Request]:
    """Some begin alike, some go on behind what was generated before, some are scored."""
    rng = np.random.default_rng(3)
    shared = rng.integers(3, 259, prefix)
    requests = []
    for number in range(rows):
        own = rng.integers(3, 259, rng.integers(1, 40))
        ids = np.concatenate([shared, own]) if number % 2 else own
        request = Request(
            number, ids.astype(np.int32), int(rng.integers(30, 90)), int(rng.integers(0, 2**63))
        )
        if number % 7 == 3:
            request.generated = rng.integers(3, 259, request.max_new_tokens - 1).astype(np.int32)
        if number % 8 == 5:
            request.scored = Scored(np.array([7, 8], np.int32), np.array([1, 0], np.int32))
            request.max_new_tokens, request.generated = 1, np.empty(0, np.int32)
        requests.append(request)
    return requests


SAMPLINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=1.0, top_p=0.9, seed=5, repetition_penalty=1.2, logprobs=2),
    "stopped": Sampling(temperature=0.8, seed=1, stop=("e", "ab", "0")),
}


def _answers(spec: EngineSpec, rows: int) -> tuple[dict[int, Completion], int]:
    with _engine(spec) as engine:
        completions = {c.id: c for c in engine.generate(iter(_requests(rows)))}
        engine._scheduler.check()
        assert sorted(completions) == [r.id for r in _requests(rows)]
        return completions, engine._scheduler.preemptions


def _check_same(spec: EngineSpec, gpus: int, rows: int = 20) -> None:
    alone, preemptions = _answers(spec, rows)
    together, _ = _answers(replace(spec, gpus=gpus), rows)
    assert preemptions or rows < 20
    for number, want in alone.items():
        have = together[number]
        assert have.token_ids.tolist() == want.token_ids.tolist(), number
        assert have.finish_reason == want.finish_reason
        assert have.values.keys() == want.values.keys()
        if "logprobs" in want.values:
            assert np.allclose(have.values["logprobs"], want.values["logprobs"], atol=1e-3)


@pytest.mark.parametrize("name", tp_models.CONFIGS)
def test_two_ranks_answer_like_one(name: str, folders: dict[str, Path]) -> None:
    _check_same(_spec(folders[name]), 2)


@pytest.mark.parametrize("sampling", ["drawn", "stopped"])
def test_two_ranks_draw_score_and_stop_like_one(sampling: str, folders: dict[str, Path]) -> None:
    _check_same(_spec(folders["qwen3"], sampling=SAMPLINGS[sampling], stop_token_ids=(17,)), 2)


@pytest.mark.parametrize("name", ["mistral", "gpt_oss"])
def test_four_ranks_answer_like_one(name: str, folders: dict[str, Path]) -> None:
    _check_same(_spec(folders[name]), 4, rows=4)


def test_what_cannot_be_divided_is_refused_before_any_process_is_started(folders: dict[str, Path]) -> None:
    with pytest.raises(Unsupported, match=r"num_attention_heads \(8\) cannot be divided by 3"):
        Ranks(_spec(folders["llama"], gpus=3), PAGE)
    with pytest.raises(Unsupported, match="no plan"):
        Ranks(_spec(tiny_models.model_folder("gpt2"), gpus=2), PAGE)
