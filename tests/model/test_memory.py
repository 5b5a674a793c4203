"""What a plan says of a model's memory is what the loaded model takes."""

from __future__ import annotations

import os

import pytest
import tiny_models

from batchrun.engine.loading import load_model
from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import EngineSpec
from batchrun.model.memory import ModelMemory, model_memory


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_weights_and_keys_are_as_large_as_planned(name: str) -> None:
    folder = str(tiny_models.model_folder(name))
    planned = model_memory(folder, tuple(os.listdir(folder)), "float32")
    assert planned is not None
    for quantization, weights in ((None, planned.weights), ("fp8", planned.fp8_weights)):
        spec = EngineSpec("paged", folder, folder, quantization=quantization, options={"cache_tokens": 512})
        model = load_model(spec)
        assert sum(p.numel() * p.itemsize for p in model.parameters()) == weights
        cache = PagedEngine(spec, model)._runner.cache
        assert cache.page_bytes == planned.token * cache.page_size


def test_weights_that_were_halved_leave_room_for_more_rows() -> None:
    memory = ModelMemory(weights=16_000, fp8_weights=9_000, token=10)
    assert memory.rows(20_000, tokens=100, fp8=False) == 4
    assert memory.rows(20_000, tokens=100, fp8=True) == 11
    assert memory.rows(15_000, tokens=100, fp8=False) == 0
