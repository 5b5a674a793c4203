"""Grouped experts against transformers' own: in Triton's interpreter where there is no GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import transformers

pytest.importorskip("triton")

from batchrun.engine import experts_kernels
from batchrun.engine.experts import IMPLEMENTATION, expert_layers, use_grouped_experts
from batchrun.engine.experts_kernels import Tile, group_by_expert

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
TILES = {
    "swapped": Tile(16, 32, 32, 4, 3, True),
    "as they are": Tile(16, 64, 32, 4, 3, False),
    "large": Tile(64, 64, 64, 4, 2, False),
}


def _model(name: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32).eval()
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


@pytest.mark.parametrize("tile", TILES)
@pytest.mark.parametrize("name", CONFIGS)
def test_a_layer_gives_what_transformers_loop_over_experts_gives(
    name: str, tile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_kernels, "tiles_for", lambda pairs, experts: (TILES[tile], TILES[tile]))
    model = _model(name)
    reference = copy.deepcopy(model)
    reference.set_experts_implementation("eager")
    assert use_grouped_experts(model) == 2
    assert model.config._experts_implementation == IMPLEMENTATION
    layer, own = expert_layers(model)[0], expert_layers(reference)[0]
    generator = torch.Generator().manual_seed(1)
    per_token = model.config.num_experts_per_tok
    for tokens in (1, 7, 50):
        x = torch.randn(tokens, SHAPE["hidden_size"], generator=generator).to(DEVICE)
        scores = torch.rand(tokens, layer.gate_up_proj.shape[0], generator=generator).to(DEVICE)
        weights, ids = scores.topk(per_token, dim=-1)
        torch.testing.assert_close(layer(x, ids, weights), own(x, ids, weights), atol=1e-4, rtol=1e-4)
