"""torch.compile for a model's layers: one compiled layer, for any number of tokens, serves all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from batchrun.engine.paged.attention.architecture import decoder_layers
from batchrun.engine.paged.device.sampler import Sampler


def compile_layers(model: nn.Module, attention: list[nn.Module]) -> int:
    """Compiles the layers that hold the attention modules, each when it first runs. Gives how many were found.

    Layer by layer, because tracing one takes a second and a model of 30 layers half a minute; what is lost is the
    fusion of the addition at a layer's end with the norm at the next one's start.
    """
    layers = decoder_layers(model, attention)
    for layer in layers:
        layer.forward = compiled(layer.forward)
    return len(layers)


def compile_sampler(sampler: Sampler) -> None:
    """Compiles the drawing of tokens, whose many passes over rows x vocabulary would each go through memory."""
    sample: Callable[..., Tensor] = torch.compile(sampler.sample, fullgraph=True)

    def call(*given: Tensor | None) -> Tensor:
        assert given[0] is not None
        rows = len(given[0])
        # A single row would be compiled for itself.
        made = [torch.cat([x, x]) if x is not None and rows == 1 else x for x in given]
        for x in made:
            if x is not None:
                torch._dynamo.mark_dynamic(x, 0)
        drawn: Tensor = sample(*made)[:rows]
        return drawn

    sampler.sample = call  # type: ignore[method-assign, assignment]


def compiled(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A layer's forward, compiled when it is first called, which tells the sizes that vary: no number of tokens is
    compiled for itself alone."""
    forward = torch.compile(forward, fullgraph=True)
    called = False

    def compile_and_call(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        # Imported once it is needed: it takes a second.
        from batchrun.engine.paged.device.reductions import read_once

        for argument in (hidden, *arguments, *named.values()):
            _mark(argument, hidden.shape[1])
        with read_once():
            return forward(hidden, *arguments, **named)

    def call(hidden: Tensor, *arguments: Any, **named: Any) -> Any:
        nonlocal called
        if not called:
            called = True
            return compile_and_call(hidden, *arguments, **named)
        return forward(hidden, *arguments, **named)

    return call


def _mark(argument: Any, tokens: int) -> None:
    if isinstance(argument, Tensor):
        if argument.ndim > 1 and argument.shape[1] == tokens:
            torch._dynamo.mark_dynamic(argument, 1)
    elif isinstance(argument, tuple | list):
        for part in argument:
            _mark(part, tokens)
