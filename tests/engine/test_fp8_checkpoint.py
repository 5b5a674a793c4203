"""Checkpoints published in fp8 are read without the packages that made them, and run as their numbers say."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import tp_models
from adapters import make_adapter
from packers import block_settings, configure, repack_in_blocks
from safetensors.torch import load_file, save_file

from batchrun.engine.layers.fp8 import Fp8Linear, quantize_rows
from batchrun.engine.layers.fp8_experts import Fp8Experts
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.engine.weights.loading import load_model
from batchrun.engine.weights.lora import read_adapter
from batchrun.errors import ModelError
from batchrun.job.settings import ModelSettings
from batchrun.model.adapter import check_adapter
from batchrun.model.check import check_model
from batchrun.model.folder import ModelFolder
from batchrun.model.memory import model_memory

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


def _blocks(folder: Path) -> dict[str, torch.Tensor]:
    """Saves the tiny llama in blocks, of which some are cut; gives the weights that its numbers stand for."""
    return repack_in_blocks(tiny_models.make_model("llama", folder), BLOCK)


def _channels(folder: Path) -> dict[str, torch.Tensor]:
    """The same with a scale for each output channel."""
    tiny_models.make_model("llama", folder)
    held: dict[str, torch.Tensor] = {}
    means: dict[str, torch.Tensor] = {}
    for name, weight in load_file(folder / "model.safetensors").items():
        if not name.endswith("proj.weight"):
            held[name] = means[name] = weight
        else:
            held[name], scale = quantize_rows(weight)
            held[f"{name}_scale"] = scale.bfloat16()
            means[name] = held[name].float() * held[f"{name}_scale"].float()
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    configure(folder, CHANNELS)
    return means


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    return EngineSpec("paged", str(folder), str(folder), **{"max_context": 128, **changes})


def test_channels_and_tokens_are_run_as_they_are(tmp_path: Path) -> None:
    means = _channels(tmp_path)
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
    means = _blocks(tmp_path)
    held = dict(load_model(_spec(tmp_path)).named_parameters())
    assert {parameter.dtype for parameter in held.values()} == {torch.float32}
    assert all(torch.equal(held[name], weight) for name, weight in means.items() if name in held)
    assert sum(name.endswith("proj.weight") for name in held) == 14


@pytest.mark.parametrize("suffix", ["_scale_inv", "_scale"])
def test_experts_in_blocks_one_tensor_for_each_are_those_of_a_plain_checkpoint(
    tmp_path: Path, suffix: str
) -> None:
    """Qwen3 MoE and DeepSeek are published so; blocks of 20 end within their weights, and a scale lies in another file
    than its weight."""
    folders = [tp_models.make_model("qwen3_moe", tmp_path / name) for name in ("blocks", "plain")]
    meant = repack_in_blocks(folders[0], 20, suffix)
    save_file(meant, folders[1] / "model.safetensors", {"format": "pt"})
    _divide_file(folders[0], suffix)
    check_model(str(folders[0]), ModelSettings(name="any"))
    for quantization in (None, "fp8"):
        models = [load_model(_spec(folder, quantization=quantization)) for folder in folders]
        blocks, plain = (dict(model.named_parameters()) for model in models)
        assert blocks.keys() == plain.keys()
        assert all(torch.equal(weight.float(), plain[name].float()) for name, weight in blocks.items())
        experts = sum(isinstance(module, Fp8Experts) for module in models[0].modules())
        assert experts == (2 if quantization else 0)
    planned = [model_memory(str(folder), _files(folder), "auto") for folder in folders]
    assert planned[0] is not None
    assert planned[0].stored == sum((folders[0] / name).stat().st_size for name in _files(folders[0]))
    assert replace(planned[0], stored=None) == planned[1]


def _divide_file(folder: Path, suffix: str) -> None:
    """All tensors whose names end so go to a second file."""
    held = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {}
    for number in (1, 2):
        file = f"model-{number:05}-of-00002.safetensors"
        mine = {name: one for name, one in held.items() if name.endswith(suffix) == (number == 2)}
        save_file(mine, folder / file, {"format": "pt"})
        index |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def _files(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(file.name for file in folder.glob("*.safetensors")))


def test_scales_of_other_blocks_than_the_config_says_are_refused(tmp_path: Path) -> None:
    _blocks(tmp_path)
    configure(tmp_path, block_settings(16))
    with pytest.raises(ModelError, match=r"scales of 2 x \d are not those of blocks of 16 x 16 of a weight"):
        load_model(_spec(tmp_path))


def test_a_gpu_without_fp8_refuses_channels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    _channels(tmp_path)
    with pytest.raises(ModelError, match="has no fp8 matrix units"):
        load_model(_spec(tmp_path, device="cuda"))


def test_blocks_are_converted_where_the_job_asks_for_fp8(tmp_path: Path) -> None:
    means = _blocks(tmp_path)
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
    means = _blocks(tmp_path / "model")
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
    _channels(tmp_path / "model")
    folder = str(tmp_path / "model")
    with pytest.raises(ModelError, match="down_proj is in fp8 in the model's checkpoint"):
        check_adapter(str(adapter), ModelFolder(folder, folder, ("model.safetensors",)))
    for how in ({"adapter": str(adapter)}, {"adapters": (str(adapter),)}):
        with pytest.raises(ModelError, match="is Fp8Linear here"):
            load_model(_spec(tmp_path / "model", **how))


def test_what_is_quantized_in_another_way_is_not_converted(tmp_path: Path) -> None:
    tiny_models.make_model("llama", tmp_path)
    configure(tmp_path, {"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(ModelError, match="quantized already, in another way"):
        load_model(_spec(tmp_path, quantization="fp8"))


def test_layers_that_the_model_does_not_have_are_refused(tmp_path: Path) -> None:
    _channels(tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    held["model.layers.0.mlp.experts.0.up_proj.weight_scale"] = torch.ones(4, 1)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        ModelError, match=r"experts\.0\.up_proj is in fp8, which is read for plain linear layers"
    ):
        load_model(_spec(tmp_path))
