"""What a rank loads of a model is its part of what one GPU loads, in every format and with an adapter's product."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny_models
import torch
import tp_models
from adapters import make_adapter
from packers import SETTINGS, configure, repack, repack_in_blocks
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from batchrun.engine.layers.fp8 import Fp8Linear
from batchrun.engine.paged.parallel.loading import Slice, read_shares
from batchrun.engine.paged.parallel.sharding import Sharding, Share
from batchrun.engine.protocol import EngineSpec
from batchrun.engine.weights.loading import load_config, load_model
from batchrun.engine.weights.row_adapters import AdaptedLinear

RANKS = 2
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    return EngineSpec("paged", str(folder), str(folder), gpus=RANKS, **changes)


def _parts(spec: EngineSpec) -> list[tuple[Sharding, Any]]:
    made = []
    for rank in range(RANKS):
        sharding = Sharding(load_config(spec), rank, RANKS)
        source = sharding.config, read_shares(spec.model_path, sharding), sharding
        made.append((sharding, load_model(spec, source=source)))
    return made


def _check_parts(spec: EngineSpec) -> None:
    whole = dict(load_model(replace(spec, gpus=1)).named_parameters())
    for sharding, model in _parts(spec):
        parts = dict(model.named_parameters())
        assert parts.keys() == whole.keys()
        for name, part in parts.items():
            assert torch.equal(part.float(), sharding.of_weight(name, whole[name]).float()), name
        assert sum(part.numel() for part in parts.values()) < sum(one.numel() for one in whole.values())


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_experts_that_a_checkpoint_keeps_apart_are_divided_each(tmp_path: Path, name: str) -> None:
    _check_parts(_spec(tp_models.make_model(name, tmp_path)))


@pytest.mark.parametrize("dim", [0, 1])
def test_a_part_of_a_tensor_in_a_file_takes_memory_for_itself_alone(tmp_path: Path, dim: int) -> None:
    rows = 4096
    save_file({"weight": torch.zeros(rows, rows)}, tmp_path / "model.safetensors")
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        part = Slice(file.get_slice("weight"), Share(dim, (rows // 4,), rows // 4))
        before = _own_memory()
        read = part[...].clone()
        grown = _own_memory() - before
    assert list(read.shape) == part.get_shape()
    assert grown < 1.2 * read.nbytes


def _own_memory() -> int:
    """Bytes that this process has, but for files that are mapped into it."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", status)[1])  # type: ignore[index]


@pytest.mark.parametrize("kind", SETTINGS)
def test_packed_weights_are_divided_once_they_are_expanded(tmp_path: Path, kind: str) -> None:
    tiny_models.make_model("llama", tmp_path)
    repack(tmp_path, kind)
    _check_parts(_spec(tmp_path))
    if kind == "static_fp8":
        assert any(isinstance(module, Fp8Linear) for module in _parts(_spec(tmp_path))[1][1].modules())


@pytest.mark.parametrize(("name", "size"), [("llama", 8), ("llama", 12), ("qwen3_moe", 20)])
def test_blocks_that_share_a_scale_are_divided(tmp_path: Path, name: str, size: int) -> None:
    """Those of 12 and 20 reach over both ranks' parts, which then have the same scale."""
    repack_in_blocks(tp_models.make_model(name, tmp_path), size)
    _check_parts(_spec(tmp_path))


def test_experts_in_mxfp4_are_divided_once_they_are_expanded(tmp_path: Path) -> None:
    tp_models.make_model("gpt_oss", tmp_path)
    held = load_file(tmp_path / "model.safetensors")
    for name in [name for name in held if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = held.pop(name).shape
        held[f"{name}_blocks"] = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        held[f"{name}_scales"] = torch.randint(122, 127, (experts, rows, columns // 32), dtype=torch.uint8)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    configure(tmp_path, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    _check_parts(_spec(tmp_path))


@pytest.mark.parametrize("quantization", [None, "fp8"])
def test_a_merged_adapter_is_divided_like_the_weights(tmp_path: Path, quantization: str | None) -> None:
    folder = tiny_models.make_model("llama", tmp_path / "model")
    adapter = str(make_adapter(tmp_path / "adapter", folder, PROJECTIONS))
    spec = _spec(folder, adapter=adapter)
    if quantization is None:
        _check_parts(spec)
        return
    # Scales of layers by rows are of the part: finer than on one GPU.
    want = dict(load_model(replace(spec, gpus=1)).named_parameters())
    for sharding, model in _parts(replace(spec, quantization=quantization)):
        layers = {name: one for name, one in model.named_modules() if isinstance(one, Fp8Linear)}
        assert layers
        for name, layer in layers.items():
            part = sharding.of_weight(f"{name}.weight", want[f"{name}.weight"])
            torch.testing.assert_close(layer.weight.float() * layer.weight_scale, part, rtol=0.07, atol=0.02)


def test_adapters_of_rows_add_up_over_the_ranks(tmp_path: Path) -> None:
    folder = tiny_models.make_model("llama", tmp_path / "model")
    adapters = tuple(
        str(make_adapter(tmp_path / f"{seed}", folder, PROJECTIONS, seed=seed)) for seed in (1, 2)
    )
    spec = _spec(folder, adapters=adapters)
    whole, parts = load_model(replace(spec, gpus=1)), [model for _, model in _parts(spec)]
    for name, by_rows in (("self_attn.o_proj", True), ("mlp.gate_proj", False)):
        layers = [model.get_submodule(f"model.layers.0.{name}") for model in (whole, *parts)]
        assert all(isinstance(layer, AdaptedLinear) for layer in layers)
        for layer in layers:
            layer.current.tokens = torch.tensor([0, 1, 2], dtype=torch.int32)
        x = torch.randn(3, layers[0].in_features)
        inputs = x.chunk(RANKS, 1) if by_rows else [x] * RANKS
        made = [layer(part) for layer, part in zip(layers[1:], inputs, strict=True)]
        torch.testing.assert_close(
            sum(made) if by_rows else torch.cat(made, 1), layers[0](x), rtol=1e-4, atol=1e-4
        )
