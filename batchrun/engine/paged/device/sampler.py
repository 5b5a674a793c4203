"""From logits to tokens, on the device: greedy, or drawn with noise that belongs to the row."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from batchrun.engine.paged.attention import devices
from batchrun.engine.protocol import Sampling
from batchrun.engine.tokens.answer_mask import AnswerMask
from batchrun.engine.tokens.noise import gumbel
from batchrun.engine.tokens.row_sampling import RowTensors, has_own, lowest_in_top_p

INVALID_TOKEN = -2
"""In place of a token where the logits hold no number to choose by."""


class Sampler:
    """Chooses each row's next token, in the order of transformers' own processors: repetition penalty, temperature,
    top-k, top-p, min-p, then a draw. With `mask`, of the tokens that it allows."""

    def __init__(self, sampling: Sampling, mask: AnswerMask | None = None) -> None:
        self.sampling = sampling
        self.mask = mask
        self.has_own = has_own(sampling)
        self.greedy = sampling.temperature == 0 and not self.has_own
        self.penalizes = sampling.repetition_penalty != 1

    def sample(
        self,
        logits: Tensor,
        row_seeds: Tensor,
        positions: Tensor,
        seen: Tensor | None = None,
        own: Tensor | None = None,
        states: Tensor | None = None,
    ) -> Tensor:
        """The next token of each row, or INVALID_TOKEN.

        Args:
            logits: (rows, vocabulary).
            row_seeds, positions: (rows,) int64, the rows' own numbers and how many tokens each has generated.
            seen: (rows, vocabulary) bool, the tokens of the row so far; wanted if `penalizes`.
            own: (rows, WIDTH) float32, the numbers of `batchrun.engine.tokens.row_sampling`; wanted if `has_own`.
            states: (rows,) int32, where each row is in the mask's automaton; wanted with a mask.
        """
        if seen is not None:
            logits = apply_repetition_penalty(logits.float(), seen, self.sampling.repetition_penalty)
        if self.greedy:
            return self._likeliest(logits, states)
        logits = logits.float()
        usable = logits.amax(dim=-1).isfinite()
        if self.mask is not None and states is not None:
            logits = self.mask.apply(logits, states)
            usable = usable & logits.amax(dim=-1).isfinite()
        noise = gumbel(self.sampling.seed, row_seeds, positions, logits.shape[1])
        if own is None:
            drawn = (self.warp(logits) + noise).argmax(dim=-1)
        else:
            rows = RowTensors.of(own)
            drawn = (self.warp(logits, rows) + torch.where(rows.draws, noise, 0.0)).argmax(dim=-1)
        return torch.where(usable, drawn, INVALID_TOKEN)

    def whole_logits(self) -> AbstractContextManager[None]:
        """Inside, the model gives logits of all tokens, wherever it gives a sampler less."""
        return nullcontext()

    def _likeliest(self, logits: Tensor, states: Tensor | None) -> Tensor:
        if self.mask is None or states is None:
            best, token = logits.max(dim=-1)
            return torch.where(best.isfinite(), token, INVALID_TOKEN)
        if devices.is_gpu(logits.device):
            from batchrun.engine.paged.device import sampler_kernels as kernels

            return kernels.likeliest_allowed(logits, states, self.mask, INVALID_TOKEN)
        best, token = self.mask.apply(logits, states).max(dim=-1)
        return torch.where(logits.amax(dim=-1).isfinite() & best.isfinite(), token, INVALID_TOKEN)

    def warp(self, logits: Tensor, own: RowTensors | None = None) -> Tensor:
        """Logits at the sampling's temperature, or the rows' own, minus infinity where a token is not to be drawn.
        float32."""
        wanted = self.sampling
        logits = logits / (wanted.temperature if own is None else own.divisor)
        if 0 < wanted.top_k < logits.shape[-1]:
            lowest = logits.topk(wanted.top_k, dim=-1).values[:, -1:]
            logits = logits.masked_fill(logits < lowest, float("-inf"))
        if own is not None and "top_p" in wanted.by_row:
            probabilities = logits.softmax(dim=-1)
            logits = logits.masked_fill(
                probabilities < top_p_thresholds(probabilities, own.top_p), float("-inf")
            )
        elif wanted.top_p < 1:
            probabilities = logits.softmax(dim=-1)
            logits = logits.masked_fill(
                probabilities < top_p_threshold(probabilities, wanted.top_p), float("-inf")
            )
        if wanted.min_p > 0:
            probabilities = logits.softmax(dim=-1)
            lowest = wanted.min_p * probabilities.amax(dim=-1, keepdim=True)
            logits = logits.masked_fill(probabilities < lowest, float("-inf"))
        return logits


def apply_repetition_penalty(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Makes tokens that stand in the row already less likely (Keskar et al., "CTRL", 2019)."""
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


@torch.library.custom_op("batchrun::top_p_threshold", mutates_args=())
def top_p_threshold(probabilities: Tensor, top_p: float) -> Tensor:
    """The smallest probability (rows, 1) among the fewest tokens that add up to `top_p` (Holtzman et al., 2020).

    Tokens as likely as the last one needed are kept as well. probabilities: (rows, vocabulary) float32.
    """
    if devices.is_gpu(probabilities.device):
        from batchrun.engine.paged.device import sampler_kernels as kernels

        return kernels.top_p_threshold(probabilities, top_p)
    ordered = probabilities.sort(dim=-1, descending=True).values
    needed = (ordered.cumsum(dim=-1) < top_p).sum(dim=-1, keepdim=True)
    return ordered.gather(1, needed.clamp(max=ordered.shape[1] - 1))


@top_p_threshold.register_fake
def _(probabilities: Tensor, top_p: float) -> Tensor:
    return probabilities.new_empty(probabilities.shape[0], 1)


@torch.library.custom_op("batchrun::top_p_thresholds", mutates_args=())
def top_p_thresholds(probabilities: Tensor, top_p: Tensor) -> Tensor:
    """The same where each row has a `top_p` (rows, 1) of its own; 0 where that is 1."""
    if devices.is_gpu(probabilities.device):
        from batchrun.engine.paged.device import sampler_kernels as kernels

        return kernels.top_p_threshold(probabilities, top_p)
    return lowest_in_top_p(probabilities.sort(dim=-1, descending=True).values, top_p)


@top_p_thresholds.register_fake
def _(probabilities: Tensor, top_p: Tensor) -> Tensor:
    return probabilities.new_empty(probabilities.shape[0], 1)
