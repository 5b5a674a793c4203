"""From logits to tokens, on the device: greedy, or drawn with noise that belongs to the row."""

from __future__ import annotations

import torch
from torch import Tensor

from batchrun.engine.noise import gumbel
from batchrun.engine.protocol import Sampling

BAD = -2
"""In place of a token where the logits hold no number to choose by."""


class Sampler:
    """Chooses each row's next token, in the order of transformers' own processors: repetition penalty, temperature,
    top-k, top-p, min-p, then a draw."""

    def __init__(self, sampling: Sampling) -> None:
        self._sampling = sampling
        self.greedy = sampling.temperature == 0
        self.penalizes = sampling.repetition_penalty != 1

    def choose(
        self, logits: Tensor, row_seeds: Tensor, positions: Tensor, seen: Tensor | None = None
    ) -> Tensor:
        """The next token of each row, or BAD.

        Args:
            logits: (rows, vocabulary).
            row_seeds, positions: (rows,) int64, the rows' own numbers and how many tokens each has generated.
            seen: (rows, vocabulary) bool, the tokens of the row so far; wanted if `penalizes`.
        """
        if seen is not None:
            logits = penalize(logits.float(), seen, self._sampling.repetition_penalty)
        if self.greedy:
            best, token = logits.max(dim=-1)
            return torch.where(best.isfinite(), token, BAD)
        logits = logits.float()
        usable = logits.amax(dim=-1).isfinite()
        noise = gumbel(self._sampling.seed, row_seeds, positions, logits.shape[1])
        drawn = (self.warp(logits) + noise).argmax(dim=-1)
        return torch.where(usable, drawn, BAD)

    def warp(self, logits: Tensor) -> Tensor:
        """Logits at the sampling's temperature, minus infinity where a token is not to be drawn. float32."""
        wanted = self._sampling
        logits = logits / wanted.temperature
        if 0 < wanted.top_k < logits.shape[-1]:
            logits = _keep(logits, logits.topk(wanted.top_k, dim=-1).values[:, -1:])
        if wanted.top_p < 1:
            logits = _keep(logits, top_p_threshold(logits, wanted.top_p))
        if wanted.min_p > 0:
            probabilities = logits.softmax(dim=-1)
            lowest = wanted.min_p * probabilities.amax(dim=-1, keepdim=True)
            logits = logits.masked_fill(probabilities < lowest, float("-inf"))
        return logits


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that stand in the row already less likely (Keskar et al., "CTRL", 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def top_p_threshold(logits: Tensor, top_p: float) -> Tensor:
    """The smallest logit (rows, 1) of the fewest tokens whose probabilities add up to `top_p` (Holtzman et al., 2020).

    Found by bisection over the 32 bits of a float, one pass over the vocabulary each: a sort of 150,000 tokens for a
    thousand rows takes ten times as long as a decode step. Tokens equal to the last one kept are kept as well.
    """
    probabilities = logits.softmax(dim=-1)
    # The bits of floats from 0 to 1 are in the order of the floats.
    low = torch.zeros(len(logits), 1, dtype=torch.int32, device=logits.device)
    high = torch.full_like(low, 0x3F800001)
    for _ in range(31):
        middle = low + (high - low) // 2
        mass = torch.where(probabilities >= middle.view(torch.float32), probabilities, 0.0).sum(
            dim=-1, keepdim=True
        )
        enough = mass >= top_p
        low, high = torch.where(enough, middle, low), torch.where(enough, high, middle)
    # At least the likeliest token stays, whatever the rounding of the sums.
    lowest = torch.minimum(low.view(torch.float32), probabilities.amax(dim=-1, keepdim=True))
    return torch.where(probabilities >= lowest, logits, float("inf")).amin(dim=-1, keepdim=True)


def _keep(logits: Tensor, lowest: Tensor) -> Tensor:
    return logits.masked_fill(logits < lowest, float("-inf"))
