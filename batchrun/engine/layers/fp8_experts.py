"""Mixture-of-experts layers in fp8: the format of `fp8.Fp8Linear`, for the weights of all experts of a layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from batchrun.engine.layers.experts import expert_layers, experts, find_gate
from batchrun.engine.layers.fp8 import quantize_rows
from batchrun.engine.layers.fp8_weights import MULTIPLE

PARAMETERS = ("gate_up_proj", "down_proj")
"""Those of a layer's experts that become fp8, by transformers' names; each gets scales, such as `down_proj_scale`."""


class Fp8Experts(nn.Module):
    """Takes the place of transformers' module: `gate_up_proj` (experts, 2 * width, features) and `down_proj`
    (experts, features, width), with scales (experts, columns, 1) float32."""

    def __init__(self, layer: Any, gate: Any) -> None:
        """Takes over the layer's own parameters, which `quantize` or a loader then converts."""
        super().__init__()
        self.gate = gate
        for name in PARAMETERS:
            weight = getattr(layer, name)
            scale = torch.empty(*weight.shape[:2], 1, dtype=torch.float32, device=weight.device)
            self.register_parameter(name, weight)
            self.register_parameter(f"{name}_scale", nn.Parameter(scale, requires_grad=False))

    def quantize(self) -> None:
        """Converts the weights, which are in another format so far, expert by expert."""
        for name in PARAMETERS:
            quantized, scale = zip(*map(quantize_rows, getattr(self, name).data), strict=True)
            setattr(self, name, nn.Parameter(torch.stack(quantized), requires_grad=False))
            setattr(self, f"{name}_scale", nn.Parameter(torch.stack(scale), requires_grad=False))

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(tokens, features) of the same and (tokens, experts per token)."""
        out: Tensor = experts(
            hidden_states,
            top_k_index,
            top_k_weights,
            self.gate_up_proj,
            None,
            self.down_proj,
            None,
            False,
            *self.gate,
            self.gate_up_proj_scale,
            self.down_proj_scale,
        )
        return out


def with_fp8_experts(model: nn.Module) -> list[Fp8Experts]:
    """Puts Fp8Experts in the place of each layer of experts that our kernels know, whose weights are not transposed,
    have no bias, and have sizes that fp8 products take. Nothing is converted yet."""
    wanted = {id(layer): gate for layer in expert_layers(model) if (gate := _gate(layer)) is not None}
    made = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if id(child) in wanted:
                made.append(Fp8Experts(child, wanted[id(child)]))
                setattr(module, name, made[-1])
    return made


def _gate(layer: Any) -> Any:
    plain = not (getattr(layer, "is_transposed", False) or getattr(layer, "has_bias", False))
    sizes = (*layer.gate_up_proj.shape[1:], *layer.down_proj.shape[1:])
    return find_gate(layer) if plain and all(size % MULTIPLE == 0 for size in sizes) else None
