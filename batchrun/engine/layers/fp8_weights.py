"""Which of a model's weights fp8 products take, and their bytes, as far as names and shapes tell.

Nothing here needs torch: commands look at a model before any engine is there.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

MULTIPLE = 16
"""Features of a layer, in and out, that fp8 products take are a multiple of it."""

ROUTERS = ("gate", "router")
"""Names that models give to the layer that chooses a token's experts."""

ONLY_CAUSAL = "only causal language models are converted to fp8"
NO_LAYERS = "the model has no linear layers that could be converted to fp8"

# What keeps its format, by how models name it: embeddings, the layer that gives the logits, and routers.
_KEPT = ("embed", "wte", "wpe", "lm_head", "output_layer", *(f".{name}." for name in ROUTERS))
# Models whose layers are transformers' Conv1D, by the same names and shapes as others' linear ones.
_CONV1D = ("gpt2", "openai-gpt")


def why_not_fp8(config: Mapping[str, Any], shapes: Mapping[str, Sequence[int]]) -> str | None:
    """Why `model.quantization: fp8` is nothing for a model, as its config and its tensors' shapes by name tell it."""
    if config.get("is_encoder_decoder"):
        return ONLY_CAUSAL
    linear = config.get("model_type") not in _CONV1D
    known = not shapes or any(becomes_fp8(name, shape) for name, shape in shapes.items())
    return None if linear and known else NO_LAYERS


def becomes_fp8(name: str, shape: Sequence[int]) -> bool:
    """Whether a weight is converted, in a model whose layers are linear ones."""
    kept = any(word in name for word in _KEPT)
    return len(shape) == 2 and not kept and all(length % MULTIPLE == 0 for length in shape)


def fp8_bytes(shape: Sequence[int]) -> int:
    """Of a weight in fp8: a number a byte, and a float32 scale a row."""
    return math.prod(shape) + 4 * shape[0]
