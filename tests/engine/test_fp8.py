"""Weights and activations in fp8: the format, its loading, and that both engines run it, on a CPU."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import traced
from torch import nn

from batchrun.engine.layers import fp8
from batchrun.engine.layers.fp8 import FP8, Fp8Linear, quantize_rows
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.device.compiling import compile_layers
from batchrun.engine.paged.device.projections import fuse_projections
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.engine.weights import fp8_model
from batchrun.engine.weights.loading import load_model
from batchrun.errors import ModelError

MODELS = ["llama", "qwen3", "mistral", "gemma2", "opt"]


def _spec(name: str, **changes: Any) -> EngineSpec:
    folder = str(tiny_models.model_folder(name))
    given = {"max_context": tiny_models.MAX_CONTEXT, "quantization": "fp8", **changes}
    return EngineSpec("paged", folder, folder, **given)


def _requests(rows: int = 12) -> list[Request]:
    rng = np.random.default_rng(3)
    prompts = [rng.integers(3, 256, rng.integers(1, 60)).astype(np.int32) for _ in range(rows)]
    return [Request(i, prompt, 16, i) for i, prompt in enumerate(prompts)]


def _answers(engine: Any) -> dict[int, list[int]]:
    return {c.id: c.token_ids.tolist() for c in engine.generate(iter(_requests()))}


def test_a_rows_largest_number_becomes_the_largest_of_the_format() -> None:
    x = torch.randn(5, 64) * torch.tensor([1e-6, 1.0, 1e4, 3.0, 0.0])[:, None]
    rows, scale = quantize_rows(x)
    assert rows.dtype == FP8
    assert rows.float().abs().amax(1).tolist() == [448, 448, 448, 448, 0]
    # Four bits of a normal number's fraction, the leading one included: off by 2 ** -4 of it at most.
    error = (rows.float() * scale - x).abs()
    assert bool((error <= 2**-4 * x.abs() + 2**-10 * scale).all())


def test_a_row_that_is_not_finite_stays_so_and_the_others_are_as_without_it() -> None:
    x = torch.randn(4, 32)
    x[1, 3], x[2, 5] = float("nan"), float("inf")
    weight, scale = quantize_rows(torch.randn(16, 32))
    out = fp8.fp8_linear(x, weight, scale, None)
    assert not bool(out[1:3].isfinite().any())
    torch.testing.assert_close(out[[0, 3]], fp8.fp8_linear(x[[0, 3]], weight, scale, None))


def test_a_layers_product_is_that_of_its_dequantized_numbers() -> None:
    linear = nn.Linear(64, 48)
    layer = Fp8Linear(linear)
    x = torch.randn(2, 7, 64)
    layer.quantize()
    rows, scale = quantize_rows(x.view(-1, 64))
    weight = layer.weight.float() * layer.weight_scale
    want = ((rows.float() * scale) @ weight.t() + layer.bias).view(2, 7, 48)
    torch.testing.assert_close(layer(x), want)
    assert layer.weight.dtype == FP8


@pytest.mark.parametrize("name", MODELS)
def test_loading_converts_the_same_numbers_as_converting_what_was_loaded(name: str) -> None:
    loaded, converted = load_model(_spec(name)), load_model(_spec(name, quantization=None))
    fp8_model.quantize(converted)
    ours, theirs = dict(loaded.named_parameters()), dict(converted.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(
        torch.equal(p.float(), theirs[n].float()) and p.dtype == theirs[n].dtype for n, p in ours.items()
    )
    assert loaded.get_output_embeddings().weight.dtype == torch.float32
    assert loaded.get_input_embeddings().weight.dtype == torch.float32


def test_each_weight_is_converted_before_the_next_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a model never lies in memory in both forms."""
    from batchrun.engine.weights import fp8_loading

    alive: list[int] = []
    converted: list[torch.Tensor] = []

    def count(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        import weakref

        converted.append(weakref.ref(weight))  # type: ignore[arg-type]
        alive.append(sum(ref() is not None for ref in converted))
        return quantize_rows(weight)

    monkeypatch.setattr(fp8_loading, "quantize_rows", count)
    load_model(_spec("llama"))
    assert len(alive) == 14
    assert max(alive) <= 2


@pytest.mark.parametrize("name", MODELS)
def test_both_engines_choose_the_tokens_of_the_dequantized_model(name: str) -> None:
    """Token by token after the same tokens, against float32 products of the same numbers."""
    paged, padded = _answers(PagedEngine.load(_spec(name))), _answers(PaddedEngine.load(_spec(name)))
    assert paged == padded
    reference = _dequantized(name)
    same: list[bool] = []
    for request in _requests():
        whole = np.concatenate([request.token_ids, paged[request.id]]).astype(np.int64)
        with torch.no_grad():
            logits = reference(input_ids=torch.from_numpy(whole)[None]).logits[0]
        chosen = logits[len(request.token_ids) - 1 : -1].argmax(-1)
        same += (chosen.numpy() == whole[len(request.token_ids) :]).tolist()
    # Rounding that differs in the last bit moves an activation to its neighbour in fp8 now and then.
    assert np.mean(same) >= 0.98


def _dequantized(name: str) -> Any:
    """The model in plain float32, with weights rounded to fp8, and with inputs of its layers that are, too."""
    model = load_model(_spec(name, quantization=None), attention="eager")
    head = model.get_output_embeddings()
    for module in model.modules():
        if isinstance(module, nn.Linear) and module is not head:
            weight, scale = quantize_rows(module.weight.data)
            module.weight.data = weight.float() * scale
            module.register_forward_pre_hook(_round_input)
    return model


def _round_input(module: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
    rows, scale = quantize_rows(given[0].reshape(-1, given[0].shape[-1]))
    return (rows.float() * scale).view(given[0].shape)


def test_joined_and_compiled_layers_give_the_same_tokens_and_compile_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced.use(monkeypatch)
    spec = _spec("qwen3")
    plain = _answers(PagedEngine.load(spec))
    engine = PagedEngine.load(spec)
    model = engine._runner._model
    assert fuse_projections(model) == 4
    assert compile_layers(model, engine._runner.cache.modules) == 2
    torch._dynamo.utils.counters.clear()
    compiled = _answers(engine)
    same = [a == b for row in plain for a, b in zip(plain[row], compiled[row], strict=True)]
    assert np.mean(same) > 0.9
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_joined_weights_are_kept_once() -> None:
    model = load_model(_spec("llama"))
    attention = model.model.layers[0].self_attn
    fuse_projections(model)
    storages = {attention.q_proj.weight.data_ptr(), attention._modules["q_proj"]._product.weight.data_ptr()}
    assert len(storages) == 1
    assert attention.v_proj.weight.untyped_storage().data_ptr() in storages


@pytest.mark.parametrize(
    ("name", "what"), [("t5", "only causal language models"), ("gpt2", "no linear layers")]
)
def test_what_cannot_be_converted_is_refused_in_one_line(name: str, what: str) -> None:
    with pytest.raises(ModelError, match=what) as caught:
        load_model(_spec(name))
    assert (caught.value.where, caught.value.fix) == ("model.quantization", "leave the key out")


def test_a_gpu_without_fp8_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100")
    with pytest.raises(ModelError, match=r"NVIDIA A100 \(compute capability 8\.0\) has no fp8") as caught:
        load_model(_spec("llama", device="cuda"))
    assert caught.value.where == "model.quantization"


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    folder = tiny_models.make_model("llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 128}))
    spec = dataclasses.replace(_spec("llama"), model_path=str(folder))
    with pytest.raises(ModelError, match="shape"):
        load_model(spec)
