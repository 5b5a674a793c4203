"""Checkpoints in published formats of quantized weights are read without the packages that made them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from adapters import make_adapter
from packers import SETTINGS, configure, repack, words
from safetensors.torch import load_file, save_file

from batchrun.engine.choose import load_engine
from batchrun.engine.layers.fp8 import Fp8Linear, quantize_rows
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.engine.weights.loading import load_model
from batchrun.engine.weights.lora import read_adapter
from batchrun.engine.weights.packed_checkpoint import expanded
from batchrun.engine.weights.packed_format import PackedFormat, packed_format
from batchrun.errors import ModelError
from batchrun.job.settings import ModelSettings
from batchrun.model.adapter import check_adapter
from batchrun.model.check import check_model
from batchrun.model.folder import ModelFolder
from batchrun.model.memory import model_memory
from batchrun.units import size

EXPANDED = [kind for kind in SETTINGS if not kind.startswith("static_fp8")]
# What compressed-tensors 0.20.1 packed, and what it then made of it again: group and channel scales, zero points.
PUBLISHED = json.loads((Path(__file__).parent / "compressed_tensors.json").read_text())


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    places = {"model_path": str(folder), "tokenizer_path": str(folder)}
    return EngineSpec(**{"kind": "paged", **places, "max_context": 128, **changes})


def _tokens(folder: Path, kind: str) -> dict[int, list[int]]:
    requests = [Request(i, np.arange(5 + i, 25 + i, dtype=np.int32), 12) for i in range(3)]
    engine = load_engine(_spec(folder, kind=kind, device="cpu"))
    return {c.id: c.token_ids.tolist() for c in engine.generate(iter(requests))}


@pytest.mark.parametrize("kind", EXPANDED)
def test_weights_are_what_the_numbers_stand_for(tmp_path: Path, kind: str) -> None:
    tiny_models.make_model("llama", tmp_path / "packed")
    tiny_models.make_model("llama", tmp_path / "plain")
    meant = repack(tmp_path / "packed", kind)
    save_file(
        {k: v.contiguous() for k, v in meant.items()}, tmp_path / "plain/model.safetensors", {"format": "pt"}
    )
    held = dict(load_model(_spec(tmp_path / "packed")).named_parameters())
    assert {parameter.dtype for parameter in held.values()} == {torch.float32}
    assert held.keys() == dict(load_model(_spec(tmp_path / "plain")).named_parameters()).keys()
    assert all(torch.equal(parameter, meant[name]) for name, parameter in held.items())
    # More than the same weights by the same names would be no more for the other kinds.
    for engine in ("paged", "padded") if kind == "awq" else ():
        assert _tokens(tmp_path / "packed", engine) == _tokens(tmp_path / "plain", engine)


@pytest.mark.parametrize("kind", ["w4a16", "w8a8", "static_fp8", "awq"])
def test_layers_that_a_config_leaves_out_keep_their_own_numbers(tmp_path: Path, kind: str) -> None:
    """Names of tensors tell which: no list of modules, and no expression that says where a scheme applies, is read. A
    scale of a head's keys, for a cache in fp8, is nobody's weight."""
    plain = load_file(tiny_models.make_model("llama", tmp_path) / "model.safetensors")
    meant = repack(tmp_path, kind)
    held = load_file(tmp_path / "model.safetensors")
    left_out = "model.layers.0.self_attn.q_proj"
    held = {name: tensor for name, tensor in held.items() if not name.startswith(f"{left_out}.")}
    meant[f"{left_out}.weight"] = held[f"{left_out}.weight"] = plain[f"{left_out}.weight"]
    held["model.layers.1.self_attn.k_scale"] = torch.tensor([0.1])
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    scheme = {"num_bits": 8, "type": "float", "strategy": "tensor", "dynamic": False}
    ignored = {"ignore": ["lm_head", r"re:.*layers\.0\.self_attn\.q.*"], "kv_cache_scheme": scheme}
    configure(tmp_path, {**SETTINGS[kind], **ignored})
    modules = dict(load_model(_spec(tmp_path)).named_modules())
    assert type(modules[left_out]) is torch.nn.Linear
    for name, weight in meant.items():
        module = modules[name.removesuffix(".weight")]
        numbers = module.weight.float()
        assert torch.equal(
            numbers * module.weight_scale if isinstance(module, Fp8Linear) else numbers, weight
        )


def test_groups_that_were_never_put_in_another_order_are_in_their_own() -> None:
    """compressed-tensors writes -1 for each feature then."""
    shape, scale = torch.tensor([8, 32]), torch.rand(8, 2)
    parts = {"weight_packed": torch.randint(0, 2**31, (8, 4), dtype=torch.int32), "weight_scale": scale}
    form = PackedFormat("packed", 4)
    unset = {**parts, "weight_shape": shape, "weight_g_idx": torch.full((32,), -1, dtype=torch.int32)}
    assert torch.equal(expanded(form, unset), expanded(form, {**parts, "weight_shape": shape}))


@pytest.mark.parametrize("published", PUBLISHED)
def test_weights_are_those_that_compressed_tensors_makes_of_its_own_tensors(
    published: dict[str, Any],
) -> None:
    form = packed_format(published["settings"])
    assert form is not None
    tensors = {
        name: torch.tensor(values, dtype=getattr(torch, dtype))
        for name, (dtype, values) in published["tensors"].items()
    }
    assert torch.equal(expanded(form, tensors), torch.tensor(published["weight"]))


@pytest.mark.parametrize(("bits", "ones"), [(4, 0x11111111), (8, 0x01010101)])
def test_gptq_zero_points_of_zero_are_what_gptqmodel_subtracted_from(bits: int, ones: int) -> None:
    draw = torch.Generator().manual_seed(0)
    numbers = torch.randint(0, 2**bits, (32, 16), generator=draw)
    zeros = torch.randint(0, 2**bits, (2, 16), generator=draw)
    zeros[:, ::3] = 0
    scales, group = torch.rand(2, 16, generator=draw).half(), torch.arange(32) // 16
    parts = {
        "qweight": words(numbers.t(), bits).t(),
        # gptqmodel.utils.model.convert_gptq_v2_to_v1_format_module
        "qzeros": words(zeros, bits) - ones,
        **{"scales": scales, "g_idx": group.int()},
    }
    weight = expanded(PackedFormat("GPTQ", bits, zeros_less_one=True), parts)
    assert torch.equal(weight, ((numbers - zeros[group]) * scales.float()[group]).t())


def test_a_bias_that_a_packer_gave_to_a_layer_without_one_counts_unless_it_is_zero(tmp_path: Path) -> None:
    tiny_models.make_model("llama", tmp_path)
    repack(tmp_path, "gptq")
    held = load_file(tmp_path / "model.safetensors")
    layers = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"
    for layer, bias in zip(layers, (1.5, 0.0), strict=True):
        held[f"{layer}.bias"] = torch.full((held[f"{layer}.scales"].shape[1],), bias, dtype=torch.float16)
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    model = load_model(_spec(tmp_path))
    with_bias, without = (model.get_submodule(layer) for layer in layers)
    assert with_bias.bias.tolist() == [1.5] * with_bias.out_features
    assert without.bias is None
    assert _tokens(tmp_path, "paged") == _tokens(tmp_path, "padded")


@pytest.mark.parametrize("kind", ["static_fp8", "static_fp8_channels"])
def test_fixed_scales_of_activations_give_way_to_a_scale_for_each_token(tmp_path: Path, kind: str) -> None:
    tiny_models.make_model("llama", tmp_path)
    meant = repack(tmp_path, kind)
    layers = {n: m for n, m in load_model(_spec(tmp_path)).named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight.float() * layer.weight_scale, meant[f"{name}.weight"])
    assert _tokens(tmp_path, "paged") == _tokens(tmp_path, "padded")
    notes = load_engine(_spec(tmp_path, device="cpu")).stats.notes
    assert any("fixed scales of activations are not used" in note for note in notes)


@pytest.mark.parametrize("kind", ["awq", "w8a8"])
def test_they_are_converted_where_the_job_asks_for_fp8(tmp_path: Path, kind: str) -> None:
    tiny_models.make_model("llama", tmp_path)
    meant = repack(tmp_path, kind)
    model = load_model(_spec(tmp_path, quantization="fp8"))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, Fp8Linear)}
    assert len(layers) == 14
    for name, layer in layers.items():
        assert torch.equal(layer.weight.float(), quantize_rows(meant[f"{name}.weight"])[0].float())


def test_mxfp4_is_what_transformers_makes_of_it() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (3, 10, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 140, (3, 10, 2), dtype=torch.uint8)
    ours = expanded(PackedFormat("MXFP4", 4), {"blocks": blocks, "scales": scales})
    assert torch.equal(ours, convert_moe_packed_tensors(blocks, scales, dtype=torch.float32))


def test_experts_in_mxfp4_give_the_plain_models_tokens(tmp_path: Path) -> None:
    config = transformers.GptOssConfig(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, num_local_experts=4, num_experts_per_tok=2, sliding_window=8,
        max_position_embeddings=256, initializer_range=0.4, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    packed, plain = tmp_path / "packed", tmp_path / "plain"
    for folder in (packed, plain):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tiny_models.make_tokenizer().save_pretrained(folder)
    held = load_file(packed / "model.safetensors")
    meant = dict(held)
    for name in [name for name in held if name.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, columns, rows = held.pop(name).shape
        blocks = torch.randint(0, 256, (experts, rows, columns // 32, 16), dtype=torch.uint8)
        scales = torch.randint(122, 127, (experts, rows, columns // 32), dtype=torch.uint8)
        held |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        meant[name] = expanded(PackedFormat("MXFP4", 4), {"blocks": blocks, "scales": scales})
    save_file(held, packed / "model.safetensors", {"format": "pt"})
    save_file(meant, plain / "model.safetensors", {"format": "pt"})
    configure(packed, {"quant_method": "mxfp4", "modules_to_not_convert": []})
    parameters = dict(load_model(_spec(packed)).named_parameters())
    assert all(torch.equal(parameters[name], tensor) for name, tensor in meant.items())
    assert _tokens(packed, "padded") == _tokens(plain, "padded")


@pytest.mark.parametrize("kind", EXPANDED)
def test_memory_is_that_of_the_expanded_weights(tmp_path: Path, kind: str) -> None:
    tiny_models.make_model("llama", tmp_path)
    plain = model_memory(str(tmp_path), ("model.safetensors",), "auto")
    repack(tmp_path, kind)
    found = model_memory(str(tmp_path), ("model.safetensors",), "auto")
    assert plain is not None
    assert found is not None
    assert (found.weights, found.fp8_weights, found.token) == (plain.weights, plain.fp8_weights, plain.token)
    stored = (tmp_path / "model.safetensors").stat().st_size
    assert (found.stored, plain.stored) == (stored, None)
    (note,) = (n for n in load_engine(_spec(tmp_path, device="cpu")).stats.notes if "expanded" in n)
    in_memory = model_memory(str(tmp_path), ("model.safetensors",), "float32").weights
    assert f"{size(in_memory)} in memory, {size(stored)} in its files" in note


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "bitsandbytes", "load_in_4bit": True},
        {"quant_method": "awq", "bits": 4, "version": "gemv"},
        {"quant_method": "gptq", "bits": 3},
        {"quant_method": "gptq", "bits": 4, "dynamic": {"+:.*down_proj": {"bits": 8}}},
        {"quant_method": "gptq", "bits": 4, "pack_dtype": "int16"},
        {"quant_method": "awq", "bits": 4, "checkpoint_format": "gemv"},
        {"quant_method": "fp8", "activation_scheme": "static"},
        {
            **SETTINGS["w4a16"],
            "config_groups": {
                name: group
                for kind in ("w4a16", "w8a16")
                for name, group in ((kind, SETTINGS[kind]["config_groups"]["group_0"]),)
            },
        },
    ],
)
def test_other_formats_are_refused_before_anything_is_loaded(
    tmp_path: Path, settings: dict[str, Any]
) -> None:
    tiny_models.make_model("llama", tmp_path)
    configure(tmp_path, settings)
    with pytest.raises(ModelError, match=rf"not read \({settings['quant_method']}.*AWQ, GPTQ"):
        check_model(str(tmp_path), ModelSettings(name="any"))


@pytest.mark.parametrize(
    ("settings", "tensors", "name"),
    [
        ({"quant_method": "awq", "bits": 4}, ("qweight", "qzeros", "scales"), "AWQ int4"),
        ({"quant_method": "gptq", "bits": 8}, ("qweight", "qzeros", "scales", "g_idx"), "GPTQ int8"),
        (SETTINGS["w4a16"], ("weight_packed", "weight_scale", "weight_shape"), "int4"),
        (SETTINGS["static_fp8"], ("weight", "weight_scale", "input_scale"), "static fp8"),
    ],
)
def test_experts_that_loading_would_refuse_are_refused_before(
    tmp_path: Path, settings: dict[str, Any], tensors: tuple[str, ...], name: str
) -> None:
    layers = [f"model.layers.0.mlp.{owner}.up_proj" for owner in ("experts.0", "shared_experts")]
    configure(tiny_models.make_model("llama", tmp_path), settings)
    held = {f"{layer}.{part}": torch.zeros(1, 1) for layer in layers for part in tensors}
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=rf"experts in {name}, such as {layers[0]}, are not read"):
        check_model(str(tmp_path), ModelSettings(name="any"))
    check_model(str(tmp_path), ModelSettings(name="any", trust_remote_code=True))
    save_file({k: v for k, v in held.items() if "shared" in k}, tmp_path / "model.safetensors")
    check_model(str(tmp_path), ModelSettings(name="any"))


@pytest.mark.parametrize("adapted", [False, True])
def test_layers_that_a_checkpoint_leaves_out_are_converted_with_the_others(
    tmp_path: Path, adapted: bool
) -> None:
    folder = tmp_path / "model"
    plain = load_file(tiny_models.make_model("llama", folder) / "model.safetensors")
    repack(folder, "w4a16")
    q_proj = "model.layers.0.self_attn.q_proj"
    held = load_file(folder / "model.safetensors")
    held = {name: tensor for name, tensor in held.items() if not name.startswith(f"{q_proj}.")}
    held[f"{q_proj}.weight"] = meant = plain[f"{q_proj}.weight"]
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    changes: dict[str, Any] = {"quantization": "fp8"}
    if adapted:
        source = tiny_models.model_folder("llama")
        changes["adapter"] = str(make_adapter(tmp_path / "adapter", source, ["q_proj"]))
        lora = read_adapter(changes["adapter"])[q_proj]
        meant = meant + lora.b @ lora.a
    model = load_model(_spec(folder, **changes))
    assert torch.equal(model.get_submodule(q_proj).weight.float(), quantize_rows(meant)[0].float())
    planned = model_memory(str(folder), ("model.safetensors",), "float32")
    assert planned is not None
    assert planned.fp8_weights == sum(p.numel() * p.itemsize for p in model.parameters())


def test_groups_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    tiny_models.make_model("llama", tmp_path)
    repack(tmp_path, "awq")
    held = load_file(tmp_path / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj"
    for part in ("qzeros", "scales"):
        held[f"{name}.{part}"] = held[f"{name}.{part}"].repeat(2, 1)[:3].contiguous()
    save_file(held, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match="32 input features cannot be 3 groups of one size"):
        load_model(_spec(tmp_path))


def test_an_adapter_is_merged_into_expanded_weights(tmp_path: Path) -> None:
    tiny_models.make_model("llama", tmp_path / "model")
    meant = repack(tmp_path / "model", "gptq")
    adapter = str(make_adapter(tmp_path / "adapter", tiny_models.model_folder("llama"), ["q_proj"]))
    folder, q_proj = str(tmp_path / "model"), "model.layers.1.self_attn.q_proj"
    assert check_adapter(adapter, ModelFolder(folder, folder, ("model.safetensors",))).layers > 0
    lora = read_adapter(adapter)[q_proj]
    layer = load_model(_spec(tmp_path / "model", adapter=adapter)).get_submodule(q_proj)
    assert torch.equal(layer.weight, meant[f"{q_proj}.weight"] + lora.b @ lora.a)
