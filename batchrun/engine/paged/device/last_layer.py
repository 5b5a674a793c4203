"""The end of a model's last layer, computed for those tokens alone whose logits are wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from batchrun.engine.paged.attention.architecture import decoder_layers
from batchrun.engine.paged.device.compiling import compiled
from batchrun.engine.weights.row_adapters import TokenAdapters

COMPILED_FROM = 4096
"""Prefills from which on the last layer is compiled for itself: two seconds, in which the GPU waits, against tenths
of a millisecond of each."""


class LastLayer:
    """What other layers make of a token becomes its key and value in the next one. After the last attention only the
    tokens count that a new one is chosen after: in a prefill, one of each sequence.

    It spares a prefill of Llama-8B 1/36 of its products, those of the last `o_proj` and `mlp`. Models that name them
    otherwise compute them for all tokens.
    """

    def __init__(self, model: nn.Module, attention: list[nn.Module]) -> None:
        """`attention` are the model's attention modules in the order they run; where its layers are compiled already,
        this one is too, for itself, in a run that lasts."""
        last = attention[-1]
        layers = [layer for layer in decoder_layers(model, attention) if last in layer.modules()]
        self._parts: list[tuple[nn.Module, str, nn.Module, _SelectedTokens]] = []
        adapters = TokenAdapters.of(model)
        if not layers:
            return
        self._layer = layers[0]
        for owner, name in ((last, "o_proj"), (self._layer, "mlp")):
            if isinstance(part := getattr(owner, name, None), nn.Module):
                self._parts.append((owner, name, part, _SelectedTokens(part, adapters)))
        self._usual = self._layer.__dict__.get("forward")
        forward = MethodType(type(self._layer).forward, self._layer)
        self._own, self._compiled = forward, compiled(forward) if self._usual else forward
        self._prefills = 0

    @contextmanager
    def only(self, tokens: Tensor) -> Iterator[None]:
        """Model calls inside leave the last layer's output of all other tokens undefined. tokens: (wanted,) int64."""
        if not self._parts:
            yield
            return
        if len(tokens) == 1:  # which would be compiled for itself
            tokens = torch.cat([tokens, tokens])
        for owner, name, _, selected in self._parts:
            selected.select(tokens)
            setattr(owner, name, selected)
        self._prefills += 1
        self._layer.forward = self._own if self._prefills < COMPILED_FROM else self._compiled
        try:
            yield
        finally:
            for owner, name, part, _ in self._parts:
                setattr(owner, name, part)
            del self._layer.forward
            if self._usual:
                self._layer.forward = self._usual


class _SelectedTokens(nn.Module):
    """A part of a layer that computes chosen tokens alone, and puts them in their places among zeros."""

    def __init__(self, part: nn.Module, adapters: TokenAdapters | None) -> None:
        super().__init__()
        self.part, self.adapters = part, adapters
        self.tokens = torch.zeros(0, dtype=torch.long)
        self._marked = False

    def select(self, tokens: Tensor) -> None:
        if not self._marked:
            torch._dynamo.mark_dynamic(tokens, 0)
            self._marked = True
        self.tokens = tokens

    def forward(self, x: Tensor, *arguments: Any, **named: Any) -> Any:
        if self.adapters is None:
            made = self.part(x[:, self.tokens], *arguments, **named)
        else:
            everyones = self.adapters.tokens
            self.adapters.tokens = everyones[self.tokens]
            made = self.part(x[:, self.tokens], *arguments, **named)
            self.adapters.tokens = everyones
        out = made[0] if isinstance(made, tuple) else made
        spread = out.new_zeros(x.shape[0], x.shape[1], out.shape[-1])
        spread[:, self.tokens] = out
        return (spread, *made[1:]) if isinstance(made, tuple) else spread
