"""What a model takes of GPUs' memory, as its files and its config tell it: weights, and a token's keys and values."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from batchrun.engine.layers.fp8_weights import becomes_fp8, fp8_bytes, why_not_fp8
from batchrun.engine.weights.packed_format import is_expanded, runs_in_fp8
from batchrun.model.check import model_shapes
from batchrun.model.files import read_json

# What each of several GPUs holds whole, beside biases and norms; the layer that gives the logits is divided by tokens.
_WHOLE = ("embed", "wte", "wpe", ".gate.", ".router.")
# Of weights in fp8: counted with them, or gone once those are expanded.
_SCALES = (".weight_scale", "_scale_inv", ".input_scale")
_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


@dataclass(frozen=True, slots=True)
class ModelMemory:
    """Bytes of the weights as a job runs them on a GPU, without and with `model.quantization: fp8`, and of a token's
    keys and values in all layers, without and with `engine.cache_dtype: fp8`.

    `whole` are the bytes among the weights that each of several GPUs holds, `heads` and `key_heads` the attention heads
    of a layer that several GPUs share out. `stored` are bytes of the files, where weights are expanded while loading.
    """

    weights: int
    fp8_weights: int
    token: int
    fp8_token: int
    whole: int = 0
    heads: int = 1
    key_heads: int = 1
    stored: int | None = None

    def weights_of(self, gpus: int, fp8: bool) -> int:
        """Bytes of weights on each of so many GPUs."""
        weights = self.fp8_weights if fp8 else self.weights
        return self.whole + -(-(weights - self.whole) // gpus)

    def rows(self, memory: float, tokens: float, fp8: bool, gpus: int = 1, fp8_cache: bool = False) -> int:
        """Rows of so many tokens that so many GPUs hold at once, each in `memory` bytes, beside the weights."""
        left = memory - self.weights_of(gpus, fp8)
        token = self.fp8_token if fp8_cache else self.token
        return max(0, int(left / (token / gpus * max(1.0, tokens))))

    def is_divided_by(self, gpus: int) -> bool:
        """Whether so many GPUs get as many heads each."""
        return self.heads % gpus == 0 and self.key_heads % gpus == 0


def model_memory(folder: str, files: tuple[str, ...], dtype: str) -> ModelMemory | None:
    """Of the model in `folder` whose weights are in `files`; None where they or its config do not tell.

    Args:
        dtype: as in the job file; "auto" is half precision, as on a GPU.
    """
    config = read_json(Path(folder) / "config.json")
    text = config.get("text_config") or config
    kept, heads = _token_heads(text), attention_heads(text)
    shapes = model_shapes(folder, files)
    if kept is None or heads is None or not shapes:
        return None
    count, size = kept
    settings = config.get("quantization_config") or {}
    kept_in_fp8 = (
        {name.removesuffix("_scale") for name in shapes if name.endswith(".weight_scale")}
        if runs_in_fp8(settings)
        else set()
    )
    converts = not kept_in_fp8 and why_not_fp8(config, shapes) is None
    number = _BYTES.get(dtype, 2)
    weights = fp8_weights = whole = 0
    for name, shape in shapes.items():
        if settings and name.endswith(_SCALES):
            continue
        if name in kept_in_fp8:
            weights += fp8_bytes(shape)
            fp8_weights += fp8_bytes(shape)
            continue
        numbers = math.prod(shape)
        weights += number * numbers
        if len(shape) < 2 or any(word in name for word in _WHOLE):
            whole += number * numbers
        becomes = converts and becomes_fp8(name, shape)
        fp8_weights += fp8_bytes(shape) if becomes else number * numbers
    # Likewise, a scale for each head.
    token, fp8_token = number * count * size, count * (size + 4)
    sizes = ((Path(folder) / file).stat().st_size for file in files if file.endswith(".safetensors"))
    stored = sum(sizes) if is_expanded(settings) else None
    return ModelMemory(weights, fp8_weights, token, fp8_token, whole, *heads, stored)


def attention_heads(config: dict[str, Any]) -> tuple[int, int] | None:
    """Query heads, and key and value heads, of a text model's config; None for a config of other names."""
    config = config.get("text_config") or config
    heads = config.get("num_attention_heads")
    return (int(heads), int(config.get("num_key_value_heads") or heads)) if heads else None


def _token_heads(config: dict[str, Any]) -> tuple[int, int] | None:
    """How many keys and values of heads a token has in all layers, and numbers in each; None for a config of other
    names."""
    layers, heads, hidden = (
        config.get(name) for name in ("num_hidden_layers", "num_attention_heads", "hidden_size")
    )
    if not (layers and heads and hidden):
        return None
    kv_heads = config.get("num_key_value_heads") or heads
    return 2 * layers * kv_heads, config.get("head_dim") or hidden // heads
