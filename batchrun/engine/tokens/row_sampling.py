"""Temperature and top-p that differ from row to row, as tensors beside the rows' logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from batchrun.engine.protocol import Request, Sampling

WIDTH = 2
"""Numbers of a row: see `numbers_of`."""


def has_own(sampling: Sampling) -> bool:
    """Whether rows have a temperature or a top-p of their own that matters."""
    by_row = set(sampling.by_row)
    return "temperature" in by_row or ("top_p" in by_row and sampling.temperature > 0)


def numbers_of(requests: Sequence[Request], sampling: Sampling) -> list[tuple[float, float]]:
    """Each row's temperature and top-p."""
    own = map(sampling.of, requests)
    return [(one.temperature, one.top_p) for one in own]


@dataclass(frozen=True, slots=True)
class RowTensors:
    """By row, (rows, 1): what logits are divided by, whether a token is drawn (else it is the likeliest), and top-p."""

    divisor: Tensor
    draws: Tensor
    top_p: Tensor

    @classmethod
    def of(cls, numbers: Tensor) -> Self:
        """From (rows, WIDTH) float32 of `numbers_of`; fixed shapes, nothing is read back."""
        temperature, top_p = numbers[:, :1], numbers[:, 1:]
        draws = temperature > 0
        return cls(torch.where(draws, temperature, 1.0), draws, top_p)


def lowest_in_top_p(ordered: Tensor, top_p: Tensor) -> Tensor:
    """(rows, 1) The smallest probability among the fewest that add up to the row's top-p; 0 where that is 1.

    Args:
        ordered: (rows, vocabulary) probabilities, descending.
        top_p: (rows, 1).
    """
    needed = (ordered.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True)
    lowest = ordered.gather(1, needed.clamp(max=ordered.shape[1] - 1))
    return torch.where(top_p < 1, lowest, 0.0)
