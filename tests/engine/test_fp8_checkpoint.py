"""Checkpoints published in fp8 are read without the packages that made them, and run as their numbers say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from adapters import make_adapter
from safetensors.torch import load_file, save_file

from batchrun.engine.layers.fp8 import FP8, Fp8Linear, quantize_rows
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.engine.weights.loading import load_model
from batchrun.engine.weights.lora import read_adapter
from batchrun.errors import ModelError
from batchrun.model.adapter import check_adapter
from batchrun.model.folder import ModelFolder

BLOCK = 24
CHANNELS: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False, "symmetric": True},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
}  # fmt: skip
BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]}


def _checkpoint(folder: Path, settings: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Saves the tiny llama in fp8; gives the weights that its numbers stand for."""
    tiny_models.make_model("llama", folder)
    held: dict[str, torch.Tensor] = {}
    means: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            held[name] = means[name] = weight
        elif settings["quant_method"] == "fp8":
            held[name], held[f"{name}_scale_inv"], means[name] = _in_blocks(weight)
        else:
            held[name], scale = quantize_rows(weight)
            held[f"{name}_scale"] = scale.bfloat16()
            means[name] = held[name].float() * held[f"{name}_scale"].float()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))
    return means


def _in_blocks(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    rows, columns = (-(-length // BLOCK) for length in weight.shape)
    quantized, scales = torch.empty_like(weight, dtype=FP8), torch.empty(rows, columns)
    meant = torch.empty_like(weight)
    for row in range(rows):
        for column in range(columns):
            place = (slice(row * BLOCK, (row + 1) * BLOCK), slice(column * BLOCK, (column + 1) * BLOCK))
            scales[row, column] = weight[place].abs().max() / 448
            quantized[place] = (weight[place] / scales[row, column]).to(FP8)
            meant[place] = quantized[place].float() * scales[row, column]
    return quantized, scales, meant


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    return EngineSpec("paged", str(folder), str(folder), **{"max_context": 128, **changes})


def test_channels_and_tokens_are_run_as_they_are(tmp_path: Path) -> None:
    means = _checkpoint(tmp_path, CHANNELS)
    model = load_model(_spec(tmp_path))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight.float() * layer.weight_scale, means[f"{name}.weight"])
    requests = [Request(i, _prompt(i), 12) for i in range(4)]
    paged, padded = (
        {c.id: c.token_ids.tolist() for c in kind.load(_spec(tmp_path)).generate(iter(requests))}
        for kind in (PagedEngine, PaddedEngine)
    )
    assert paged == padded


def _prompt(number: int) -> Any:
    return np.arange(5 + number, 25 + number, dtype=np.int32)


def test_blocks_are_expanded_to_what_their_numbers_stand_for(tmp_path: Path) -> None:
    means = _checkpoint(tmp_path, BLOCKS)
    held = dict(load_model(_spec(tmp_path)).named_parameters())
    assert {parameter.dtype for parameter in held.values()} == {torch.float32}
    assert all(torch.equal(held[name], weight) for name, weight in means.items() if name in held)
    assert sum(name.endswith("proj.weight") for name in held) == 14


def test_a_gpu_without_fp8_refuses_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    _checkpoint(tmp_path, CHANNELS)
    with pytest.raises(ModelError, match="has no fp8 matrix units"):
        load_model(_spec(tmp_path, device="cuda"))


def test_blocks_are_converted_where_the_job_asks_for_fp8(tmp_path: Path) -> None:
    means = _checkpoint(tmp_path, BLOCKS)
    model = load_model(_spec(tmp_path, quantization="fp8"))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        weight, scale = quantize_rows(means[f"{name}.weight"])
        assert torch.equal(layer.weight.float(), weight.float())
        assert torch.equal(layer.weight_scale, scale)


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_blocks_get_an_adapters_product_before_they_are_converted(
    tmp_path: Path, quantization: str | None
) -> None:
    means = _checkpoint(tmp_path / "model", BLOCKS)
    adapter = make_adapter(tmp_path / "adapter", tmp_path / "model", ["q_proj"])
    q_proj = "model.layers.1.self_attn.q_proj"
    lora = read_adapter(str(adapter))[q_proj]
    model = load_model(_spec(tmp_path / "model", quantization=quantization, adapter=str(adapter)))
    want = means[f"{q_proj}.weight"] + lora.b @ lora.a
    layer = model.get_submodule(q_proj)
    if quantization == "fp8":
        assert torch.equal(layer.weight.float(), quantize_rows(want)[0].float())
    else:
        assert torch.equal(layer.weight, want)


def test_channels_cannot_be_added_to(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_models.model_folder("llama"))
    _checkpoint(tmp_path / "model", CHANNELS)
    folder = str(tmp_path / "model")
    with pytest.raises(ModelError, match="down_proj is in fp8 in the model's checkpoint"):
        check_adapter(str(adapter), ModelFolder(folder, folder, ("model.safetensors",)))
    for how in ({"adapter": str(adapter)}, {"adapters": (str(adapter),)}):
        with pytest.raises(ModelError, match="is Fp8Linear here"):
            load_model(_spec(tmp_path / "model", **how))


def test_what_is_quantized_in_another_way_is_not_converted(tmp_path: Path) -> None:
    tiny_models.make_model("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(config | settings))
    with pytest.raises(ModelError, match="quantized already, in another way"):
        load_model(_spec(tmp_path, quantization="fp8"))


def test_layers_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    _checkpoint(tmp_path, CHANNELS)
    held = load_file(tmp_path / "model.safetensors")
    held["model.layers.0.mlp.experts.0.up_proj.weight_scale"] = torch.ones(4, 1)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"experts\.0\.up_proj is in fp8, which is read for plain linear layers"
    ):
        load_model(_spec(tmp_path))
