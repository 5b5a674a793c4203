"""Log probabilities of given tokens: hidden states of chosen positions, and the model's head over a few at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchrun.engine.protocol import NO_TOKENS, Completion, Request
from batchrun.errors import FaultCode, RowFault

# Of logits in float32 at a time: far more than a product needs to be fast, far less than a batch of whole texts has.
_LOGITS_BYTES = 256 << 20


class ScoringHead:
    """What a model does behind its layers: the head, and whatever scales or caps the logits.

    A batch of texts has a logit for every token of the vocabulary at every position, gigabytes of them. Here the
    positions' hidden states are kept, and a few of them at a time go through the model's own forward pass, in which
    they stand in for what its layers give.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._layers = model, model.get_decoder()
        self._output: Any = None
        vocabulary = model.config.get_text_config(decoder=True).vocab_size
        self._rows = max(1, _LOGITS_BYTES // (4 * vocabulary))

    @contextmanager
    def states(self, rows: Tensor | int, columns: Tensor) -> Iterator[list[Tensor]]:
        """The first model call inside leaves here its last hidden states (places, size) at these rows and columns,
        (places,) int64 each."""
        kept: list[Tensor] = []

        def keep(module: Any, arguments: Any, output: Any) -> None:
            if not kept:
                self._output = type(output)
                kept.append(output[0][rows, columns])

        hook = self._layers.register_forward_hook(keep)
        try:
            yield kept
        finally:
            hook.remove()

    def logprobs(
        self, states: Tensor, tokens: Tensor, places: Tensor, host_places: NDArray[np.int64]
    ) -> Tensor:
        """(tokens,) float32 log probabilities; not finite where the logits are no numbers.

        Args:
            states: (places, size), as `states` kept them.
            tokens: (tokens,) int64.
            places: (tokens,) int64, ascending: the state that each token comes after. `host_places` are the same.
        """
        found = []
        for first in range(0, len(states), self._rows):
            begin, end = np.searchsorted(host_places, [first, first + self._rows]).tolist()
            logits = self._logits(states[first : first + self._rows]).float()
            rows = places[begin:end] - first
            found.append(logits[rows, tokens[begin:end]] - logits.logsumexp(dim=-1)[rows])
        return torch.cat(found)

    def _logits(self, states: Tensor) -> Tensor:
        """(places, vocabulary) in the model's own type."""
        usual = self._layers.__dict__.get("forward")
        output = (states[None],) if self._output is tuple else self._output(states[None])
        self._layers.forward = lambda *arguments, **named: output
        try:
            ids = torch.zeros((1, len(states)), dtype=torch.long, device=states.device)
            logits: Tensor = self._model(input_ids=ids, use_cache=False).logits[0]
            return logits
        finally:
            del self._layers.forward
            if usual is not None:
                self._layers.forward = usual


def score_completion(request: Request, logprobs: NDArray[np.float32] | None) -> Completion:
    """That of a request to score, with (tokens,) log probabilities."""
    assert request.scored is not None
    assert logprobs is not None
    if not np.isfinite(logprobs).all():
        fault = RowFault(FaultCode.BAD_LOGITS, "the model gave no finite logits")
        return Completion(request.id, NO_TOKENS, "error", fault)
    return Completion(request.id, request.scored.token_ids, "stop", values={"logprobs": logprobs})
