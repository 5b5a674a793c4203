"""The paged engine against `model.generate`, on a CPU in float32."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.loading import load_model
from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import Completion, EngineSpec, Request, Sampling

MODELS = ["llama", "qwen3", "mistral", "gemma2", "gpt2", "opt"]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.make_model(name, root / name) for name in MODELS}


@pytest.fixture(scope="session")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    """Each model once as transformers runs it; it stops only where it is told to."""
    loaded = {name: load_model(_spec(folder), attention="eager") for name, folder in folders.items()}
    for model in loaded.values():
        model.generation_config.eos_token_id = None
    return loaded


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    return EngineSpec("paged", str(folder), str(folder), max_context=tiny_models.MAX_CONTEXT, **changes)


def _engine(folder: Path, page_size: int = 16, **changes: Any) -> PagedEngine:
    spec = _spec(folder, **changes)
    return PagedEngine(spec, load_model(spec), page_size=page_size)


def _requests(
    seed: int, rows: int, longest: int = 90, most_new: int = 24, prefix: int = 0
) -> list[Request]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, 259, prefix)
    return [
        Request(
            id=number,
            token_ids=np.concatenate([shared, rng.integers(3, 259, rng.integers(1, longest))]).astype(np.int32),
            max_new_tokens=int(rng.integers(1, most_new + 1)),
            row_seed=int(rng.integers(0, 2**63)),
        )
        for number in range(rows)
    ]


def _run(engine: PagedEngine, requests: list[Request]) -> dict[int, Completion]:
    completions = list(engine.generate(iter(requests)))
    engine._scheduler.check()
    assert sorted(c.id for c in completions) == sorted(r.id for r in requests)
    return {c.id: c for c in completions}


def _generate(model: Any, request: Request, stops: tuple[int, ...] = ()) -> list[int]:
    """What transformers answers to the row alone."""
    prompt = torch.tensor(request.token_ids[None].astype(np.int64))
    config = transformers.GenerationConfig(
        max_new_tokens=request.max_new_tokens, do_sample=False, eos_token_id=list(stops) or None, pad_token_id=0
    )
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_generate_row_by_row(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    engine = _engine(folders[name])
    requests = _requests(seed=1, rows=24)
    completions = _run(engine, requests)
    for request in requests:
        assert completions[request.id].token_ids.tolist() == _generate(models[name], request)
