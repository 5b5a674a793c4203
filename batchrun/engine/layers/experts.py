"""Mixture-of-experts layers on a GPU: a few kernels for all experts of a layer, no loop over them, no copy of weights.

transformers' models hand tokens, their experts and those experts' weights to one function that their config names. The
one that is registered here runs the kernels of `experts_kernels`.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from batchrun.engine.layers.expert_routers import use_fused_routers
from batchrun.engine.layers.fp8 import quantize_rows

IMPLEMENTATION = "batchrun"
"""The name under which a config asks for it."""


class Gate(NamedTuple):
    """What becomes of the first product's columns: a gate of `experts_kernels.grouped_product`, and their order."""

    name: str
    interleaved: bool
    alpha: float = 0.0
    limit: float = 0.0

    def __call__(self, columns: Tensor) -> Tensor:
        """(..., columns / 2) of (..., columns), in plain torch."""
        if self.interleaved:
            gate, up = columns[..., ::2], columns[..., 1::2]
        else:
            gate, up = columns.chunk(2, dim=-1)
        if self.name == "silu":
            return functional.silu(gate) * up
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return gate * torch.sigmoid(self.alpha * gate) * (up + 1)


def use_grouped_experts(model: nn.Module) -> int:
    """Has a model's experts computed by grouped products, where these know the kind of all of them: others stay with
    what transformers chose. Those in fp8 have no other way. Gives the number of layers."""
    layers = expert_layers(model)
    others = [layer for layer in layers if not hasattr(layer, "gate_up_proj_scale")]
    gates = [find_gate(layer) for layer in others]
    if not layers or None in gates:
        return 0
    use_fused_routers(model)
    for layer, gate in zip(others, gates, strict=True):
        layer.grouped_gate = gate
    if others:
        ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, _forward)
        model.set_experts_implementation(IMPLEMENTATION)  # type: ignore[operator]
    return len(layers)


def expert_layers(model: nn.Module) -> list[Any]:
    """Modules that hold the weights of many experts in two parameters."""
    return [
        module
        for module in model.modules()
        if all(
            isinstance(weight := getattr(module, name, None), nn.Parameter) and weight.ndim == 3
            for name in ("gate_up_proj", "down_proj")
        )
    ]


def find_gate(layer: Any) -> Gate | None:
    """The gate that computes what the layer's own does, found by trying: its name would not tell."""
    own = getattr(layer, "_apply_gate", None)
    known = layer.gate_up_proj.dtype in (torch.float32, torch.bfloat16, torch.float16)
    if own is None or not known or getattr(layer, "has_post_expert_norm", False):
        return None
    clamp = float(getattr(layer, "alpha", 0.0)), float(getattr(layer, "limit", 0.0))
    columns = torch.linspace(-12, 12, 64, device="cpu").reshape(32, 2).t().reshape(4, 16)
    wanted = own(columns)
    for interleaved in (False, True):
        for gate in (Gate("silu", interleaved), Gate("clamped", interleaved, *clamp)):
            if torch.allclose(gate(columns), wanted, atol=1e-5):
                return gate
    return None


def _forward(layer: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What a layer of experts gives, called by transformers.

    Args:
        hidden_states: (tokens, features). top_k_index, top_k_weights: (tokens, experts per token).
    """
    gate, bias = layer.grouped_gate, getattr(layer, "has_bias", False)
    out: Tensor = experts(
        hidden_states,
        top_k_index,
        top_k_weights,
        layer.gate_up_proj,
        layer.gate_up_proj_bias if bias else None,
        layer.down_proj,
        layer.down_proj_bias if bias else None,
        getattr(layer, "is_transposed", False),
        *gate,
    )
    return out


def experts(x: Tensor, expert_ids: Tensor, weights: Tensor, gate_up: Any, *others: Any) -> Tensor:
    """The weighted sum of what each token's experts make of it, (tokens, features): see `expert_parts` for what is
    given, but for the weights, (tokens, experts per token)."""
    parts = expert_parts(x, expert_ids, gate_up, *others)
    return weighted_sum(parts, expert_ids, weights, len(gate_up))


def weighted_sum(parts: Tensor, expert_ids: Tensor, weights: Tensor, held: int) -> Tensor:
    """What `expert_parts` gave, of as many experts as are held here, added up in float32 and always in the same order.

    In plain torch, so that a compiled layer adds the sum to its own input while it is at it.
    """
    here = (expert_ids >= 0) & (expert_ids < held)
    # Of experts that are elsewhere nothing was written, and that may be no number.
    weighted = (
        weights[:, number, None].float() * parts[:, number].float().where(here[:, number, None], 0.0)
        for number in range(expert_ids.shape[1])
    )
    total: Tensor = functools.reduce(torch.add, weighted)
    return total.to(parts.dtype)


@torch.library.custom_op("batchrun::expert_parts", mutates_args=())
def expert_parts(
    x: Tensor,
    expert_ids: Tensor,
    gate_up: Tensor,
    gate_up_bias: Tensor | None,
    down: Tensor,
    down_bias: Tensor | None,
    transposed: bool,
    gate: str,
    interleaved: bool,
    alpha: float,
    limit: float,
    gate_up_scale: Tensor | None = None,
    down_scale: Tensor | None = None,
) -> Tensor:
    """What each of a token's experts makes of it; an operator of its own, so that a compiled layer may run with any
    number of tokens.

    Args:
        x: (tokens, features).
        expert_ids: (tokens, experts per token). A pair counts where its expert is one of those that `gate_up` holds: of
            experts that are divided over several GPUs each has its own, numbered from 0.
        gate_up: (experts, 2 * width, features), or `transposed`. gate_up_bias: (experts, 2 * width).
        down: (experts, features, width), or `transposed`. down_bias: (experts, features).
        gate, interleaved, alpha, limit: see `Gate`.
        gate_up_scale, down_scale: of weights in fp8, those of their columns: (experts, columns, 1) float32. What goes
            into a product is then in fp8, too, each row with a scale of its own.

    Returns:
        (tokens, experts per token, features); of pairs that do not count, anything.
    """
    if transposed:
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not len(x):
        return x.new_zeros(*expert_ids.shape, x.shape[1])
    x, expert_ids = x.contiguous(), expert_ids.contiguous()
    first = Product(gate_up, gate_up_bias, gate_up_scale)
    second = Product(down, down_bias, down_scale)
    made = Gate(gate, interleaved, alpha, limit)
    if gate_up_scale is not None and not x.is_cuda:
        return _one_by_one(x, expert_ids, first, second, made)
    return grouped(x, expert_ids, first, second, made)


@expert_parts.register_fake
def _(x: Tensor, expert_ids: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*expert_ids.shape, x.shape[1])


class Product(NamedTuple):
    """The weights of a layer's experts for one of its products: (experts, columns, features), and what belongs to the
    columns: (experts, columns), and of weights in fp8 (experts, columns, 1)."""

    weight: Tensor
    bias: Tensor | None
    scale: Tensor | None


def grouped(x: Tensor, expert_ids: Tensor, first: Product, second: Product, gate: Gate) -> Tensor:
    """`expert_parts` by our kernels; `x` and `expert_ids` contiguous."""
    from batchrun.engine.layers import experts_kernels as kernels
    from batchrun.engine.layers.expert_groups import group_by_expert

    per_token, held = expert_ids.shape[1], len(first.weight)
    pairs = expert_ids.numel()
    tile = kernels.tile_for(pairs, held, first.weight.dtype, kernels.shared_memory(x.device))
    groups = group_by_expert(expert_ids, held, tile.rows)
    gated = x.new_empty(pairs, second.weight.shape[2])
    parts = x.new_empty(pairs, second.weight.shape[1])
    rows, scale = kernels.quantize_rows(x) if first.scale is not None else (x, None)
    kernels.grouped_product(
        rows, first.weight, first.bias, gated, groups, tile, per_token, *gate, scale, first.scale
    )
    rows, scale = kernels.quantize_rows(gated) if second.scale is not None else (gated, None)
    kernels.grouped_product(
        rows, second.weight, second.bias, parts, groups, tile, per_token,
        x_scale=scale, weight_scale=second.scale,
    )  # fmt: skip
    return parts.view(*expert_ids.shape, -1)


def _one_by_one(x: Tensor, expert_ids: Tensor, first: Product, second: Product, gate: Gate) -> Tensor:
    """The same numbers on a CPU, which has no products of fp8."""
    parts = x.new_zeros(*expert_ids.shape, x.shape[1])
    for expert in range(len(first.weight)):
        tokens, places = (expert_ids == expert).nonzero(as_tuple=True)
        columns = gate(_product(x[tokens], first, expert)).to(x.dtype)
        parts[tokens, places] = _product(columns, second, expert).to(x.dtype)
    return parts


def _product(x: Tensor, product: Product, expert: int) -> Tensor:
    rows, scale = quantize_rows(x)
    assert product.scale is not None
    out = rows.float() @ product.weight[expert].float().t() * scale * product.scale[expert].t()
    return out if product.bias is None else out + product.bias[expert].float()
