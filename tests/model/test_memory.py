"""What a plan says of a model's memory is what the loaded model takes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import tiny_models
from packers import repack

from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import EngineSpec
from batchrun.engine.weights.loading import load_model
from batchrun.model.memory import ModelMemory, model_memory


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2"])
def test_weights_and_keys_are_as_large_as_planned(name: str) -> None:
    folder = str(tiny_models.model_folder(name))
    planned = model_memory(folder, tuple(os.listdir(folder)), "float32")
    assert planned is not None
    for quantization, cache_dtype, weights, token in (
        (None, "auto", planned.weights, planned.token),
        ("fp8", "fp8", planned.fp8_weights, planned.fp8_token),
    ):
        spec = EngineSpec(
            "paged",
            folder,
            folder,
            quantization=quantization,
            cache_dtype=cache_dtype,
            options={"cache_tokens": 512},
        )
        model = load_model(spec)
        assert sum(p.numel() * p.itemsize for p in model.parameters()) == weights
        cache = PagedEngine(spec, model)._runner.cache
        assert cache.page_bytes == token * cache.page_size


def test_a_model_without_linear_layers_is_not_offered_fp8(tmp_path: Path) -> None:
    config = tiny_models.make_model("gpt2", tmp_path) / "config.json"
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}
    config.write_text(json.dumps(json.loads(config.read_text()) | sizes))
    planned = model_memory(str(tmp_path), tuple(os.listdir(tmp_path)), "auto")
    assert planned is not None
    assert planned.fp8_weights == planned.weights


@pytest.mark.parametrize("kind", ["static_fp8", "static_fp8_channels"])
def test_weights_that_a_checkpoint_has_in_fp8_are_a_byte_a_number(tmp_path: Path, kind: str) -> None:
    tiny_models.make_model("llama", tmp_path)
    repack(tmp_path, kind)
    planned = model_memory(str(tmp_path), ("model.safetensors",), "float32")
    model = load_model(EngineSpec("paged", str(tmp_path), str(tmp_path)))
    assert planned is not None
    loaded = sum(p.numel() * p.itemsize for p in model.parameters())
    assert planned.weights == planned.fp8_weights == loaded


def test_weights_that_were_halved_leave_room_for_more_rows() -> None:
    memory = ModelMemory(weights=16_000, fp8_weights=9_000, token=10, fp8_token=5)
    assert memory.rows(20_000, tokens=100, fp8=False, fp8_cache=False) == 4
    assert memory.rows(20_000, tokens=100, fp8=True, fp8_cache=False) == 11
    assert memory.rows(20_000, tokens=100, fp8=False, fp8_cache=True) == 8
    assert memory.rows(15_000, tokens=100, fp8=False, fp8_cache=False) == 0
