"""Which requests go through the model together: rectangles of nearly equal rows."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from batchrun.engine.protocol import Request

# More rows than this make a step slower without making its weights any cheaper.
MAX_ROWS = 1024
# An eighth of the budget keeps the device busy; from there on, rows must have nine tenths of its width.
# Real share of 8,192 lognormal prompts with 8 new tokens: 0.974 to 0.979 at a CPU's budget of 16,384 padded
# tokens, 0.698 to 0.913 at a large GPU's of 500,000.
TIGHTNESS, ENOUGH = 0.9, 1 / 8


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Requests that become one rectangle of (rows, longest start + most tokens still to come)."""

    requests: list[Request]

    @property
    def longest(self) -> int:
        """Tokens of the longest row's start."""
        return max(map(_length, self.requests))

    @property
    def new_tokens(self) -> int:
        """Tokens that may still be generated for the row that lacks most."""
        return max(request.remaining for request in self.requests)

    @property
    def padded_tokens(self) -> int:
        """Tokens of the whole rectangle, those still to come included."""
        return len(self.requests) * (self.longest + self.new_tokens)

    def rectangle(self, left: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids int64 and attention mask int64, both (rows, longest start), padded left or right.

        A row is padded with its own first token: so a model without a padding token needs none, and nothing
        that counts tokens (a repetition penalty) meets one that is not the row's.
        """
        shape = len(self.requests), self.longest
        ids, mask = np.empty(shape, np.int64), np.zeros(shape, np.int64)
        for row, request in enumerate(self.requests):
            length = _length(request)
            place = slice(shape[1] - length, None) if left else slice(length)
            ids[row] = request.token_ids[0]
            ids[row, place] = request.start
            mask[row, place] = 1
        return torch.from_numpy(ids), torch.from_numpy(mask)


def by_length(requests: Iterable[Request]) -> list[Request]:
    """Longest first, rows with similar limits together, and those of an adapter; rows that are equal in all keep
    their order."""
    return sorted(requests, key=lambda r: (-_limit_class(r), r.adapter, -_length(r)))


def take_batch(waiting: deque[Request], budget: int, equal_lengths: bool = False) -> PaddedBatch:
    """Takes the next batch off the left of `waiting`: as many rows of one adapter as fit, and always at least one.

    Args:
        budget: padded tokens, counted with the longest start and the largest limit of the batch.
        equal_lengths: cut where the start's length changes, for models that padding would change.
    """
    longest = limit = rows = 0
    for request in islice(waiting, MAX_ROWS):
        length = _length(request)
        longest, limit = max(longest, length), max(limit, request.remaining)
        if rows and (
            (rows + 1) * (longest + limit) > budget
            or _limit_class(request) != _limit_class(waiting[0])
            or request.adapter != waiting[0].adapter
            or (equal_lengths and length != longest)
            or _wastes(length + limit, longest + limit, rows, budget)
        ):
            break
        rows += 1
    return PaddedBatch([waiting.popleft() for _ in range(rows)])


def _wastes(own: int, width: int, rows: int, budget: int) -> bool:
    """Whether the row is too short for a batch that is large enough to go without it."""
    return own < TIGHTNESS * width and rows * width > ENOUGH * budget


def _limit_class(request: Request) -> int:
    """Rows whose limits differ by less than two are worth a batch of their own kind."""
    return request.remaining.bit_length()


def _length(request: Request) -> int:
    """Tokens of the row's start."""
    return len(request.token_ids) + len(request.generated)
