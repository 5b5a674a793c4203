"""The likeliest token where each rank has the logits of its own tokens alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from batchrun.engine.paged.device.sampler import INVALID_TOKEN, Sampler
from batchrun.engine.paged.parallel.sharding import DividedHead
from batchrun.engine.paged.parallel.sums import columns_of_ranks
from batchrun.engine.protocol import EngineSpec, Sampling
from batchrun.engine.tokens.answer_mask import AnswerMask


def sampler_of(spec: EngineSpec, model: Any) -> Sampler:
    """What chooses the model's tokens: of a head that is divided over ranks, each rank its own where that will do."""
    sampler, head = Sampler(spec.sampling, AnswerMask.of(spec, model)), model.get_output_embeddings()
    alone = (
        sampler.greedy and not sampler.penalizes and sampler.mask is None and spec.sampling.logprobs is None
    )
    if alone and isinstance(head, DividedHead) and head.has_tokens_everywhere:
        return DividedSampler(spec.sampling, head)
    return sampler


class DividedSampler(Sampler):
    """Greedy, without logits of the whole vocabulary on any rank: these would be sent, put in order and read again."""

    def __init__(self, sampling: Sampling, head: DividedHead) -> None:
        """From now on `head` gives each rank its own columns."""
        super().__init__(sampling)
        self._head = head
        head.whole = False

    @contextmanager
    def whole_logits(self) -> Iterator[None]:
        """Inside, the head gives all columns."""
        self._head.whole = True
        try:
            yield
        finally:
            self._head.whole = False

    def _likeliest(self, logits: Tensor, states: Tensor | None) -> Tensor:
        best, token = logits.max(dim=-1)
        # In float32, which has every number of a vocabulary.
        own = torch.stack([best.float(), (token + self._head.first).float()], dim=1)
        everyones = columns_of_ranks(own, self._head.size).view(len(logits), self._head.size, 2)
        # The first of equals, as of a whole vocabulary.
        best, rank = everyones[:, :, 0].max(dim=1)
        token = everyones[:, :, 1].gather(1, rank[:, None])[:, 0].long()
        return torch.where(best.isfinite(), token, INVALID_TOKEN)
