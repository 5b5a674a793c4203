"""Which layers of a model become fp8."""

from __future__ import annotations

from typing import cast

from torch import nn

from batchrun.engine.layers.fp8 import Fp8Linear
from batchrun.engine.layers.fp8_experts import Fp8Experts, with_fp8_experts
from batchrun.engine.layers.fp8_weights import MULTIPLE, ROUTERS


def with_fp8_layers(model: nn.Module) -> list[Fp8Linear | Fp8Experts]:
    """Puts an Fp8Linear in the place of each linear layer whose sizes allow it, but for the one that gives the logits,
    whose errors are those of a token's probability, and for routers, which send a token elsewhere at a near tie; and
    Fp8Experts in that of experts. Nothing is converted yet."""
    head = cast(nn.Module | None, model.get_output_embeddings())  # type: ignore[operator]
    layers: list[Fp8Linear | Fp8Experts] = [*with_fp8_experts(model)]
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is not nn.Linear or child is head or name in ROUTERS:
                continue
            if child.in_features % MULTIPLE == 0 and child.out_features % MULTIPLE == 0:
                layer = Fp8Linear(child)
                layers.append(layer)
                setattr(module, name, layer)
    return layers


def quantize(model: nn.Module) -> int:
    """Converts a model in place, layer by layer; none is there twice for longer than it takes. Returns how many."""
    layers = with_fp8_layers(model)
    for layer in layers:
        layer.quantize()
    return len(layers)
