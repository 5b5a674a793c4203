"""The tokens that an answer may have, as a mask of its logits: tensors only, nothing goes through the host."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from batchrun.engine.protocol import EngineSpec, Request, TokenIds, TokenTables

# Bytes of unpacked masks at a time while packing, and of a mask's expansion on a CPU.
_CHUNK_BYTES = 64 << 20
_CACHED = 1 << 20


class AnswerMask:
    """Keeps rows to the answers of an automaton over tokens.

    A row's whole memory is its state, an int32 that starts where its request says, or at `start`. `apply` before a
    token is chosen, `advance` after. Both are of fixed shapes, index tables on the device and read nothing back, so
    that they can stand inside of a captured decode step.

    Args:
        tables: the automaton; state 0 is dead and 1 ended.
        vocab: how many logits a row has.
        completes: answers of which just one ending is left end there, and `rest` is the ending.
    """

    def __init__(
        self, tables: TokenTables, vocab: int, device: str | torch.device, completes: bool = False
    ) -> None:
        self.vocab, self.start = vocab, tables.start
        # Ids that only the logits have are of a class of their own, which leads nowhere.
        classes = tables.next_state.shape[1]
        self._next = np.pad(tables.next_state, ((0, 0), (0, 1)))
        self._class = np.full(max(vocab, len(tables.token_class)), classes, np.int32)
        self._class[: len(tables.token_class)] = tables.token_class
        masks, mask_of = _packed_masks(self._next != 0, self._class[:vocab])
        self._words = masks.shape[1]
        self.masks = torch.from_numpy(masks).to(device)
        self.mask_of = torch.from_numpy(mask_of).to(device)
        self.next_state = torch.from_numpy(self._next.reshape(-1)).to(device)
        self.token_class = torch.from_numpy(self._class).to(device)
        only = tables.only if completes else None
        self._only = np.full(len(self._next), -1, np.int32) if only is None else only
        # (states,) bool, on the device: whether just one ending is left.
        self.settled = torch.from_numpy(self._only >= 0).to(device)
        following = self._next[self.start]
        # Where the model may think first, most do.
        settles = bool((self._only[following[following > 0]] >= 0).any())
        self.settles_at_once = settles and tables.thinking is None
        self._bits = torch.arange(32, dtype=torch.int32, device=device)
        self._rows = max(1, _CACHED // vocab) if torch.device(device).type == "cpu" else None

    @classmethod
    def of(cls, spec: EngineSpec, model: Any) -> Self | None:
        """The mask of the spec's answers for the logits of a transformers model; None where answers are free."""
        if spec.answers is None:
            return None
        # What is wanted of every token, the model has to be run for.
        completes = spec.sampling.logprobs is None and not spec.sampling.stop
        vocab = model.config.get_text_config(decoder=True).vocab_size
        return cls(spec.answers, vocab, model.device, completes)

    def begin(self, requests: Sequence[Request], generated: Sequence[TokenIds]) -> NDArray[np.int32]:
        """(rows,) states of rows that have these tokens of their answers already, on the host."""
        states = []
        for request, tokens in zip(requests, generated, strict=True):
            state = self.start if request.answer_state is None else request.answer_state
            for kind in self._class[tokens].tolist():
                state = int(self._next[state, kind])
            states.append(state)
        return np.array(states, np.int32)

    def rest(self, request: Request, answer: Sequence[int] | TokenIds) -> list[int]:
        """The tokens that complete an answer whose state is `settled`; none where it has ended."""
        state = int(self.begin([request], [np.asarray(answer, np.int32)])[0])
        rest: list[int] = []
        while (token := int(self._only[state])) >= 0:
            rest.append(token)
            state = int(self._next[state, self._class[token]])
        return rest

    def allowed(self, states: Tensor) -> Tensor:
        """(rows, vocabulary) bool: whether the token may be next. `states` (rows,) int32."""
        words = self.masks.index_select(0, self.mask_of.index_select(0, states))
        bits = (words.unsqueeze(-1) >> self._bits) & 1
        return bits.view(len(states), 32 * self._words)[:, : self.vocab] != 0

    def apply(self, logits: Tensor, states: Tensor) -> Tensor:
        """The logits (rows, vocabulary), minus infinity where a token is not allowed."""
        if self._rows is None or len(logits) <= self._rows:
            return logits.masked_fill(~self.allowed(states), float("-inf"))
        parts = zip(torch.split(logits, self._rows), torch.split(states, self._rows), strict=True)
        return torch.cat([part.masked_fill(~self.allowed(some), float("-inf")) for part, some in parts])

    def advance(self, states: Tensor, tokens: Tensor) -> Tensor:
        """(rows,) int32 states behind these tokens (rows,), any integer type."""
        classes = self.token_class.index_select(0, tokens)
        places = states.to(torch.int64) * self._next.shape[1] + classes
        return self.next_state.index_select(0, places).to(torch.int32)


def _packed_masks(allowed: np.ndarray, token_class: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`allowed` (states, classes) bool as masks (masks, words) int32, a bit per token, and (states,) the mask of each.

    States far from any limit allow the same tokens: masks are fewer than states.
    """
    packed_rows = np.packbits(allowed, axis=1)
    rows = packed_rows.view(np.dtype((np.void, packed_rows.shape[1]))).reshape(-1)
    _, first, mask_of = np.unique(rows, return_index=True, return_inverse=True)
    words = -(-len(token_class) // 32)
    masks = np.zeros((len(first), words * 4), np.uint8)
    step = max(1, _CHUNK_BYTES // len(token_class))
    for place in range(0, len(first), step):
        tokens = allowed[first[place : place + step]][:, token_class]
        packed = np.packbits(tokens, axis=1, bitorder="little")
        masks[place : place + step, : packed.shape[1]] = packed
    return masks.view(np.int32), mask_of.astype(np.int32)
