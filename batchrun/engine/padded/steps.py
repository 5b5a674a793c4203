"""What happens to a padded batch between two steps of `generate`: sampling, stopping, broken logits."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchrun.engine.protocol import EngineStats, Request, Sampling
from batchrun.engine.tokens.answer_mask import AnswerMask
from batchrun.engine.tokens.noise import gumbel, signed
from batchrun.engine.tokens.row_sampling import RowTensors, has_own, lowest_in_top_p, numbers_of
from batchrun.engine.tokens.stopping import StopStrings
from batchrun.engine.tokens.token_values import ValuesOfTokens

# On a CPU, noise for so many (row, token) pairs at a time stays in the cache: 84 instead of 298 ms for 256
# rows of 32,000 tokens on one core.
CACHED_NOISE = 1 << 17
CANCEL_SECONDS = 0.2  # between two looks at whether rows are still wanted


class BatchState(StoppingCriteria):
    """The rows' ends, kept on the device; `generate` asks after every step which rows are done.

    `lengths` (rows,) is how many new tokens of each answer count, `stopped` and `broken` (rows,) why it ended early.
    `values` are those of each step's tokens, (rows,) or (rows, width). With a mask, `states` (rows,) are the answers'
    and `settled` (rows,) those that have just one ending left.
    Once a request is cancelled the whole batch ends: `cut` (rows,) are those that would have gone on.
    """

    def __init__(
        self,
        requests: Sequence[Request],
        stop_ids: Tensor,
        stop_strings: StopStrings,
        width: int,
        stats: EngineStats,
        values_of_tokens: ValuesOfTokens,
        mask: AnswerMask | None = None,
    ) -> None:
        device = stop_ids.device
        self.requests, self.stats = requests, stats
        self.generated = [len(request.generated) for request in requests]
        self.offsets = torch.tensor(self.generated, device=device)
        self.limits = torch.tensor([request.remaining for request in requests], device=device)
        self.row_seeds = torch.tensor([signed(request.row_seed) for request in requests], device=device)
        self.lengths = self.limits.clone()
        self.done = torch.zeros(len(requests), dtype=torch.bool, device=device)
        self.stopped, self.broken, self.cut = self.done.clone(), self.done.clone(), self.done.clone()
        self.mask, self.settled = mask, self.done.clone()
        self.states: Tensor | None = None
        if mask is not None:
            self.states = torch.from_numpy(mask.begin(requests, [r.generated for r in requests])).to(device)
        self.stop_ids = stop_ids
        self.stop_strings = stop_strings
        # `generate` hands over prompt and answer in one tensor; the answer starts here.
        self.width = width
        self.steps = 0
        self.values_of_tokens = values_of_tokens
        # The step's logits as the model gave them, and what was computed from those of every step.
        self.logits: Tensor | None = None
        self.values: list[dict[str, Tensor]] = []
        self._looked = time.monotonic()

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """(rows,) bool: which rows are done after this step. `input_ids` (rows, width + steps)."""
        self.steps += 1
        self.stats.steps += 1
        if self.logits is not None:
            self.values.append(self.values_of_tokens.compute(self.logits, input_ids[:, -1]))
        stops = torch.isin(input_ids[:, -1], self.stop_ids)
        if self.stop_strings:
            stops |= self._string_completed(input_ids, ~(self.done | stops))
        stops &= ~self.broken
        if self.mask is not None and self.states is not None:
            self.states = self.mask.advance(self.states, input_ids[:, -1])
            settled = self.mask.settled.index_select(0, self.states)
            self.settled |= settled & ~(self.done | stops | self.broken)
        ends = ~self.done & (stops | self.broken | self.settled | (self.limits <= self.steps))
        self.lengths = torch.where(ends, self.steps, self.lengths)
        self.stopped |= ends & stops
        self.done = self.done | ends
        if self._cancelled():
            self.cut = ~self.done
            self.lengths = torch.where(self.cut, self.steps, self.lengths)
            self.done = self.done | self.cut
        return self.done

    def _cancelled(self) -> bool:
        now = time.monotonic()
        if now - self._looked < CANCEL_SECONDS:
            return False
        self._looked = now
        return any(request.cancelled for request in self.requests)

    def _string_completed(self, input_ids: Tensor, rows: Tensor) -> Tensor:
        rows_running = rows.nonzero().squeeze(1)
        # Tokens of earlier attempts stand at the end of the prompt's columns, which are padded on the left then.
        numbers = rows_running.tolist()
        starts = [self.width - self.generated[row] for row in numbers]
        strings = [self.stop_strings.of(self.requests[row]) for row in numbers]
        tail = max(map(self.stop_strings.tail, set(strings)), default=0)
        first = max(min(starts, default=0), input_ids.shape[1] - tail)
        tails = input_ids[rows_running, first:].tolist()
        answers = [tail[max(0, start - first) :] for tail, start in zip(tails, starts, strict=True)]
        completed = torch.zeros_like(rows)
        if answers:
            found = self.stop_strings.completed(answers, strings)
            completed[rows_running] = torch.tensor(found, device=rows.device)
        return completed


class CheckLogits(LogitsProcessor):
    """Marks rows whose logits are not numbers any more, and gives them some that do no harm."""

    def __init__(self, state: BatchState) -> None:
        self.state = state

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary) logits of numbers only."""
        # NaN and infinity both come through a maximum; a single -inf is a legal "never this token".
        broken = ~torch.isfinite(scores.amax(-1))
        if self.state.values_of_tokens:
            self.state.logits = scores
        self.state.broken |= broken & ~self.state.done
        return scores.masked_fill(broken.unsqueeze(1), 0.0)


class RowTemperature(LogitsProcessor):
    """Each row's own temperature; greedy rows stay as they are."""

    def __init__(self, own: RowTensors) -> None:
        self.own = own

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary) logits at the rows' temperatures."""
        return scores / self.own.divisor


class RowTopP(LogitsProcessor):
    """Each row's own top-p."""

    def __init__(self, own: RowTensors) -> None:
        self.own = own

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, -inf where a token is not among the likeliest that add up to its row's top-p."""
        probabilities = scores.softmax(dim=-1)
        ordered = probabilities.sort(dim=-1, descending=True).values
        lowest = lowest_in_top_p(ordered, self.own.top_p)
        return scores.masked_fill(probabilities < lowest, float("-inf"))


class GumbelNoise(LogitsProcessor):
    """Turns the argmax that follows into a draw from the softmax, by the rows' own noise; not of greedy rows."""

    def __init__(self, seed: int, state: BatchState, own: RowTensors | None = None) -> None:
        self.seed, self.state, self.own = seed, state, own

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """(rows, vocabulary) logits with the noise of this step added in place."""
        vocab = scores.shape[-1]
        rows = max(1, CACHED_NOISE // vocab) if scores.device.type == "cpu" else len(scores)
        state = self.state
        own = [] if self.own is None else [self.own.draws]
        parts = zip(
            *(torch.split(one, rows) for one in (scores, state.row_seeds, state.offsets, *own)), strict=True
        )
        for part, row_seeds, offsets, *draws in parts:
            noise = gumbel(self.seed, row_seeds, offsets + self.state.steps, vocab)
            part += noise.masked_fill_(~draws[0], 0.0) if draws else noise
        return scores


class KeepToAnswers(LogitsProcessor):
    """Leaves the tokens that the answers' tables allow."""

    def __init__(self, mask: AnswerMask, state: BatchState) -> None:
        self.mask, self.state = mask, state

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, -inf where a token would leave the answers."""
        assert self.state.states is not None
        kept = self.mask.apply(scores, self.state.states)
        # The model may rule out whatever the answers allow.
        ruled_out = ~torch.isfinite(kept.amax(-1))
        self.state.broken |= ruled_out & ~self.state.done
        return kept.masked_fill(ruled_out.unsqueeze(1), 0.0)


def logits_processors(sampling: Sampling, state: BatchState) -> list[LogitsProcessor]:
    """transformers' own processors in transformers' own order, between the check and the noise."""
    processors: list[LogitsProcessor] = [CheckLogits(state)]
    if state.mask is not None:
        processors.append(KeepToAnswers(state.mask, state))
    if sampling.repetition_penalty != 1.0:
        processors.append(RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty)))
    own = _own(sampling, state)
    if sampling.temperature == 0.0 and own is None:
        return processors
    processors.append(
        TemperatureLogitsWarper(float(sampling.temperature)) if own is None else RowTemperature(own)
    )
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if own is not None and "top_p" in sampling.by_row:
        processors.append(RowTopP(own))
    elif sampling.top_p < 1.0:
        processors.append(TopPLogitsWarper(float(sampling.top_p)))
    if sampling.min_p:
        processors.append(MinPLogitsWarper(float(sampling.min_p)))
    return [*processors, GumbelNoise(sampling.seed, state, own)]


def _own(sampling: Sampling, state: BatchState) -> RowTensors | None:
    """The rows' own settings, None where all rows have the job's."""
    if not has_own(sampling):
        return None
    numbers = torch.tensor(numbers_of(state.requests, sampling), dtype=torch.float32)
    return RowTensors.of(numbers.to(state.offsets.device))
