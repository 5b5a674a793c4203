"""Grouped experts against transformers' own: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import cuda_stand_in
import numpy as np
import pytest
import torch
import traced
import transformers

pytest.importorskip("triton")

from batchrun.engine.layers import experts_kernels, fp8
from batchrun.engine.layers.expert_groups import group_by_expert
from batchrun.engine.layers.expert_routers import FusedRouter, use_fused_routers
from batchrun.engine.layers.experts import (
    IMPLEMENTATION,
    Product,
    expert_layers,
    grouped,
    use_grouped_experts,
    weighted_sum,
)
from batchrun.engine.layers.experts_kernels import Tile
from batchrun.engine.layers.fp8_experts import Fp8Experts
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.attention import operator as attention
from batchrun.engine.paged.attention.flash import FlashAttention
from batchrun.engine.paged.device.compiling import compile_layers
from batchrun.engine.protocol import Completion, EngineSpec, Request
from batchrun.engine.weights import fp8_model
from batchrun.engine.weights.loading import load_model

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SHAPE = {
    "vocab_size": 320, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
    "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 2,
}  # fmt: skip
CONFIGS: dict[str, Any] = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE, head_dim=16, moe_intermediate_size=40, num_experts=11, num_experts_per_tok=3, norm_topk_prob=True
    ),
    "mixtral": lambda: transformers.MixtralConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE, head_dim=16, sliding_window=8, num_local_experts=6, num_experts_per_tok=3
    ),
}  # fmt: skip
FP8_CONFIGS = {
    "qwen3_moe": lambda: transformers.Qwen3MoeConfig(
        **SHAPE,
        head_dim=16,
        moe_intermediate_size=32,
        num_experts=11,
        num_experts_per_tok=3,
        norm_topk_prob=True,
    ),
    "mixtral": CONFIGS["mixtral"],
}
TILES = {
    "swapped": Tile(16, 32, 32, 4, 3, True),
    "as they are": Tile(16, 64, 32, 4, 3, False),
    "large": Tile(64, 64, 64, 4, 2, False),
    "with halves": Tile(128, 32, 32, 8, 2, False),
}
OPTIONS: dict[str, object] = {"max_rows": 2, "prefill_tokens": 32, "decode_steps": 2, "cache_tokens": 192}


def _model(name: str, configs: dict[str, Any] = CONFIGS) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(configs[name](), dtype=torch.float32).eval()
    for parameter in model.parameters():
        # Biases and sinks are zeros until somebody trains them.
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.4)
    return model.to(DEVICE)


@pytest.mark.parametrize("tile_rows", [16, 64])
@pytest.mark.parametrize(
    ("tokens", "per_token", "experts"), [(1, 1, 1), (5, 3, 7), (90, 4, 16), (700, 2, 130)]
)
def test_pairs_come_in_the_order_of_experts_and_tiles_cover_each_once(
    tokens: int, per_token: int, experts: int, tile_rows: int
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    # Some belong to experts that are elsewhere, and one expert gets none.
    ids = torch.randint(-1, experts + 2, (tokens, per_token), generator=generator)
    ids[ids == experts // 2] = 0
    groups = group_by_expert(ids.to(DEVICE), experts, tile_rows)
    flat = ids.flatten().tolist()
    wanted = [pair for expert in range(experts) for pair, one in enumerate(flat) if one == expert]
    assert groups.order[: len(wanted)].tolist() == wanted
    covered = []
    for expert, row, stop in groups.tiles.t().tolist():
        rows = range(row, min(row + tile_rows, stop))
        assert all(flat[wanted[place]] == expert for place in rows)
        covered += rows
    assert covered == list(range(len(wanted)))
    _, row, stop = groups.tiles
    assert groups.needed.tolist() == [int((row < stop).sum())]


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_gives_what_transformers_loop_over_experts_gives(
    name: str, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_kernels, "tile_for", lambda *_: TILES[tile])
    if tile == "as they are":
        # As on a GPU without descriptors.
        monkeypatch.setattr(experts_kernels, "is_describable", lambda *_: False)
    model = _model(name)
    reference = copy.deepcopy(model)
    reference.set_experts_implementation("eager")
    assert use_grouped_experts(model) == 2
    assert model.config._experts_implementation == IMPLEMENTATION
    layer, own = expert_layers(model)[0], expert_layers(reference)[0]
    generator = torch.Generator().manual_seed(1)
    per_token = model.config.num_experts_per_tok
    for tokens in (1, 7, 200 if tile == "with halves" else 50):
        x = torch.randn(tokens, SHAPE["hidden_size"], generator=generator).to(DEVICE)
        scores = torch.rand(tokens, layer.gate_up_proj.shape[0], generator=generator).to(DEVICE)
        weights, ids = scores.topk(per_token, dim=-1)
        torch.testing.assert_close(layer(x, ids, weights), own(x, ids, weights), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_router_chooses_and_weighs_as_transformers_does(name: str, normalised: bool) -> None:
    model = _model(name)
    routers = [module for module in model.modules() if hasattr(module, "top_k") and hasattr(module, "weight")]
    if name == "qwen3_moe":
        for router in routers:
            router.norm_topk_prob = normalised
    x = torch.randn(33, SHAPE["hidden_size"], generator=torch.Generator().manual_seed(5)).to(DEVICE)
    with torch.no_grad():
        wanted = [router(x) for router in routers]
        assert use_fused_routers(model) == len(routers) == 2
        routers = [module for module in model.modules() if isinstance(module, FusedRouter)]
        for router, (logits, weights, experts) in zip(routers, wanted, strict=True):
            own = router(x)
            torch.testing.assert_close(own[0], logits)
            torch.testing.assert_close(own[1], weights)
            assert own[2].tolist() == experts.tolist()
        x[3, 7] = float("nan")
        own = routers[0](x)
    assert own[1][3].isnan().all()
    assert own[1].isnan().any(1).sum() == 1
    assert int(own[2].min()) >= 0
    assert int(own[2].max()) < own[0].shape[1]


def test_experts_that_are_elsewhere_add_nothing() -> None:
    """Experts divided over several GPUs, or halves of all of them, add up to the layer."""
    model = _model("qwen3_moe")
    assert use_grouped_experts(model)
    layer = expert_layers(model)[0]
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, SHAPE["hidden_size"], generator=generator).to(DEVICE)
    weights, ids = torch.rand(9, 11, generator=generator).to(DEVICE).topk(3, dim=-1)
    whole, gate_up, down = layer(x, ids, weights), layer.gate_up_proj.data, layer.down_proj.data

    def part(ids: torch.Tensor, gate_up: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
        layer.gate_up_proj.data, layer.down_proj.data = gate_up.contiguous(), down.contiguous()
        return layer(x, ids, weights)

    by_expert = [
        part(ids - first, gate_up[first:stop], down[first:stop]) for first, stop in ((0, 5), (5, 11))
    ]
    torch.testing.assert_close(sum(by_expert), whole, atol=1e-4, rtol=1e-4)
    halves = gate_up.unflatten(1, (2, 40)).split(20, dim=2)
    by_width = [
        part(ids, own.flatten(1, 2), down[..., 20 * number : 20 * number + 20])
        for number, own in enumerate(halves)
    ]
    torch.testing.assert_close(sum(by_width), whole, atol=1e-4, rtol=1e-4)


def test_experts_of_a_kind_that_the_kernels_do_not_know_stay_with_transformers() -> None:
    model = _model("qwen3_moe")
    before = model.config._experts_implementation
    layer = expert_layers(model)[1]
    layer.act_fn = torch.nn.GELU()
    assert use_grouped_experts(model) == 0
    assert model.config._experts_implementation == before
    assert use_grouped_experts(torch.nn.Linear(2, 2)) == 0


def _requests(rows: int, prefix: int) -> list[Request]:
    rng = np.random.default_rng(rows)
    shared = rng.integers(3, 300, prefix)
    prompts = [
        np.concatenate([shared, rng.integers(3, 300, 1 + 5 * n)]).astype(np.int32) for n in range(rows)
    ]
    return [Request(n, prompt, 2 + n, n) for n, prompt in enumerate(prompts)]


def _check(reference: Any, requests: list[Request], completions: list[Completion]) -> None:
    """Each row is what transformers generates for it alone."""
    found = {one.id: one.token_ids.tolist() for one in completions}
    for request in requests:
        ids = torch.tensor(request.token_ids[None].astype(np.int64), device=DEVICE)
        mask = torch.ones_like(ids)
        wanted = reference.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=request.max_new_tokens,
            do_sample=False,
            eos_token_id=None,
        )
        assert found[request.id] == wanted[0, ids.shape[1] :].tolist()


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's float32 is another one's")
def test_compiled_layers_give_the_tokens_of_generate_and_are_one_graph(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    traced.use(monkeypatch)
    reference, model = _model("gpt_oss"), _model("gpt_oss")
    engine = PagedEngine(EngineSpec("paged", "", "", max_context=128, options=OPTIONS), model, page_size=16)
    assert use_grouped_experts(model) == 2
    assert compile_layers(model, engine._runner.cache.modules) == 2
    torch._dynamo.utils.counters.clear()
    requests = _requests(rows=2, prefix=0)
    _check(reference, requests, list(engine.generate(iter(requests))))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU's float32 is another one's")
@pytest.mark.parametrize("name", CONFIGS)
def test_the_paged_engine_on_a_gpu_gives_the_tokens_of_generate(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    reference, model = _model(name), _model(name)
    cuda_stand_in.install(monkeypatch)
    monkeypatch.setattr(attention, "choose_backend", lambda *_: FlashAttention())
    engine = PagedEngine(EngineSpec("paged", "", "", max_context=128, options=OPTIONS), model, page_size=16)
    assert model.config._experts_implementation == IMPLEMENTATION
    requests = _requests(rows=2, prefix=20)
    completions = list(engine.generate(iter(requests)))
    assert engine.stats.shared_tokens
    assert cuda_stand_in.Graph.captured > 1
    _check(reference, requests, completions)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_padded_engine_gives_the_tokens_of_generate(name: str) -> None:
    reference, model = _model(name), _model(name)
    assert use_grouped_experts(model) == 2
    spec = EngineSpec("padded", "", "", device=DEVICE, max_context=128, options={"batch_tokens": 120})
    requests = _requests(rows=2, prefix=0)
    _check(reference, requests, list(PaddedEngine(spec, model).generate(iter(requests))))


@pytest.mark.parametrize("tokens", [1, 30])
def test_experts_in_fp8_give_what_their_dequantized_numbers_give(
    tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if DEVICE == "cpu":
        # Triton's interpreter rounds some numbers to the wrong one of fp8.
        monkeypatch.setattr(experts_kernels, "quantize_rows", fp8.quantize_rows)
    model = _model("qwen3_moe", FP8_CONFIGS)
    reference = copy.deepcopy(expert_layers(model)[0])
    reference.config._experts_implementation = "eager"
    fp8_model.quantize(model)
    layer = model.model.layers[0].mlp.experts
    assert isinstance(layer, Fp8Experts)
    for name in ("gate_up_proj", "down_proj"):
        weight = getattr(layer, name)
        assert weight.dtype == fp8.FP8
        getattr(reference, name).data = weight.float() * getattr(layer, f"{name}_scale")
    x = torch.randn(tokens, 48, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    weights, ids = (
        torch.rand(tokens, 11, generator=torch.Generator().manual_seed(4)).to(DEVICE).topk(3, dim=-1)
    )
    with torch.no_grad():
        plain, wanted = layer(x, ids, weights), reference(x, ids, weights)
        products = [
            Product(getattr(layer, name), None, getattr(layer, f"{name}_scale"))
            for name in ("gate_up_proj", "down_proj")
        ]
        kernels = weighted_sum(grouped(x, ids, *products, layer.gate), ids, weights, 11)
    # A hidden number at the middle between two of fp8 may become either.
    assert (plain - kernels).abs().mean() < 2e-3 * wanted.std()
    assert (plain - wanted).abs().mean() < 0.06 * wanted.std()
    ids[0] = 99
    assert not weighted_sum(grouped(x, ids, *products, layer.gate), ids, weights, 11)[0].any()


@pytest.mark.parametrize("name", FP8_CONFIGS)
def test_loading_converts_experts_to_fp8_and_both_engines_give_the_same_tokens(
    name: str, tmp_path: Path
) -> None:
    _model(name, FP8_CONFIGS).cpu().save_pretrained(tmp_path)
    folder = str(tmp_path)
    spec = EngineSpec(
        "paged", folder, folder, quantization="fp8", device="cpu", max_context=128, options=OPTIONS
    )
    loaded, converted = load_model(spec), load_model(replace(spec, quantization=None))
    fp8_model.quantize(converted)
    ours, theirs = dict(loaded.named_parameters()), dict(converted.named_parameters())
    assert ours.keys() == theirs.keys()
    assert sum("experts" in name and weight.dtype == fp8.FP8 for name, weight in ours.items()) == 4
    for key, weight in ours.items():
        assert torch.equal(weight.float(), theirs[key].float())
    requests = _requests(rows=2, prefix=0)
    paged = PagedEngine(spec, loaded, page_size=16).generate(iter(requests))
    padded = PaddedEngine(replace(spec, options={"batch_tokens": 120}), converted).generate(iter(requests))
    assert {one.id: one.token_ids.tolist() for one in paged} == {
        one.id: one.token_ids.tolist() for one in padded
    }
