"""What a model takes of a GPU's memory, as its files and its config tell it: weights, and a token's keys and values."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchrun.engine.packed_format import packed_format
from batchrun.model.check import model_shapes

# What keeps its format, by how models name it: embeddings, the layer that gives the logits, routers and experts.
_KEPT = ("embed", "wte", "wpe", "lm_head", "output_layer", ".gate.", ".router.", "experts.")
_FP8_MULTIPLE = 16
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of the weights as a job runs them on a GPU, without and with `model.quantization: fp8`, and of a token's
    keys and values in all layers. `stored`: bytes of the files, where their weights are expanded while loading."""

    weights: int
    fp8_weights: int
    token: int
    stored: int | None = None

    def rows(self, memory: float, tokens: float, fp8: bool) -> int:
        """Rows of so many tokens that are in `memory` bytes at once, beside the weights."""
        left = memory - (self.fp8_weights if fp8 else self.weights)
        return max(0, int(left / (self.token * max(1.0, tokens))))


def model_memory(folder: str, files: tuple[str, ...], dtype: str) -> ModelMemory | None:
    """Of the model in `folder` whose weights are in `files`; None where they or its config do not tell.

    Args:
        dtype: as in the job file; "auto" is half precision, as on a GPU.
    """
    config = json.loads((Path(folder) / "config.json").read_bytes())
    token = _token_numbers(config.get("text_config") or config)
    shapes = model_shapes(folder, files)
    if token is None or not shapes:
        return None
    number = _BYTES.get(dtype, 2)
    weights = fp8_weights = 0
    for name, shape in shapes.items():
        count = 1
        for length in shape:
            count *= length
        weights += number * count
        # A number a byte, and a float32 scale a row.
        fp8_weights += count + 4 * shape[0] if _becomes_fp8(name, shape) else number * count
    settings = config.get("quantization_config") or {}
    form = packed_format(settings)
    expands = form.expands if form is not None else bool(settings.get("weight_block_size"))
    sizes = ((Path(folder) / file).stat().st_size for file in files if file.endswith(".safetensors"))
    stored = sum(sizes) if expands else None
    return ModelMemory(weights, fp8_weights, number * token, stored)


def _becomes_fp8(name: str, shape: list[int]) -> bool:
    kept = any(word in name for word in _KEPT)
    return len(shape) == 2 and not kept and all(length % _FP8_MULTIPLE == 0 for length in shape)


def _token_numbers(config: dict[str, Any]) -> int | None:
    """Numbers in a token's keys and values; None for a config of other names."""
    layers, heads, hidden = (
        config.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (layers and heads and hidden):
        return None
    kv_heads = config.get("num_key_value_heads") or heads
    return int(2 * layers * kv_heads * (config.get("head_dim") or hidden // heads))
