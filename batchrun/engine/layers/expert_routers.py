"""Layers that choose a token's experts, on a GPU: the choice in one kernel instead of a softmax, a sort and a sum."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional


class FusedRouter(nn.Module):
    """Takes the place of a router that chooses by the largest logits and weighs by their softmax."""

    def __init__(self, router: Any, among_chosen: bool) -> None:
        """Takes over the router's own parameters."""
        super().__init__()
        self.weight, self.bias = router.weight, getattr(router, "bias", None)
        self.top_k, self.among_chosen = router.top_k, among_chosen

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Of (tokens, features): logits (tokens, experts), and weights and experts, (tokens, experts per token)."""
        logits = _logits(self, hidden_states)
        weights, experts = route(logits, self.top_k, self.among_chosen)
        return logits, weights, experts


def use_fused_routers(model: nn.Module) -> int:
    """Puts a FusedRouter in the place of each router that gives the same, and leaves others as they are. Gives the
    number of those that changed."""
    changed = 0
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if (among_chosen := _weighs_among_chosen(child)) is not None:
                setattr(module, name, FusedRouter(child, among_chosen))
                changed += 1
    return changed


def _logits(router: Any, hidden_states: Tensor) -> Tensor:
    return functional.linear(
        hidden_states.reshape(-1, router.weight.shape[1]), router.weight, getattr(router, "bias", None)
    )


@torch.library.custom_op("batchrun::route", mutates_args=())
def route(logits: Tensor, per_token: int, among_chosen: bool) -> tuple[Tensor, Tensor]:
    """See `experts_kernels.route`."""
    from batchrun.engine.layers import experts_kernels

    return experts_kernels.route(logits.contiguous(), per_token, among_chosen)


@route.register_fake
def _(logits: Tensor, per_token: int, among_chosen: bool) -> tuple[Tensor, Tensor]:
    weights = logits.new_empty(logits.shape[0], per_token, dtype=torch.float32)
    return weights, torch.empty_like(weights, dtype=torch.int32)


def _weighs_among_chosen(module: Any) -> bool | None:
    """Whether a router's weights are a softmax over the experts that it chose, or over all, found by trying it; None
    for whatever is no such router."""
    weight, top_k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not (isinstance(weight, nn.Parameter) and weight.ndim == 2 and isinstance(top_k, int)):
        return None
    generator = torch.Generator(weight.device).manual_seed(0)
    x = torch.randn(64, weight.shape[1], generator=generator, device=weight.device).to(weight.dtype)
    with torch.no_grad():
        try:
            logits, weights, experts = module(x)
        except (TypeError, ValueError, RuntimeError):
            return None
        wanted = _logits(module, x)
        if logits.shape != wanted.shape or weights.shape != (64, top_k) or experts.shape != (64, top_k):
            return None
        largest = wanted.float().topk(top_k).values
        # Equal logits may go to either expert.
        if not torch.allclose(wanted.float().gather(1, experts.long()), largest, atol=1e-2, rtol=1e-2):
            return None
        if torch.allclose(weights.float(), largest.softmax(-1), atol=1e-2, rtol=1e-2):
            return True
        over_all = (largest - wanted.float().logsumexp(-1, keepdim=True)).exp()
        return False if torch.allclose(weights.float(), over_all, atol=1e-2, rtol=1e-2) else None
