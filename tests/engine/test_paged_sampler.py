"""Which tokens may be drawn, how often, and with whose noise."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from batchrun.engine.paged.device.compiling import compile_sampler
from batchrun.engine.paged.device.sampler import INVALID_TOKEN, Sampler, apply_repetition_penalty
from batchrun.engine.protocol import Sampling, TokenTables
from batchrun.engine.tokens.answer_mask import AnswerMask

SETTINGS = [
    Sampling(temperature=0.7),
    Sampling(temperature=1.3, top_k=7),
    Sampling(temperature=1.0, top_p=0.8),
    Sampling(temperature=1.0, min_p=0.1),
    Sampling(temperature=0.8, top_k=20, top_p=0.9, min_p=0.02),
]


def _logits(rows: int, vocabulary: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * 2


@pytest.mark.parametrize("sampling", SETTINGS)
def test_the_tokens_that_may_be_drawn_are_those_of_transformers(sampling: Sampling) -> None:
    logits = _logits(200, 500)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    expected = warpers(None, logits)
    torch.testing.assert_close(Sampler(sampling).warp(logits), expected)


@pytest.mark.parametrize("sampling", SETTINGS)
def test_tokens_are_drawn_as_often_as_their_probabilities_say(sampling: Sampling) -> None:
    draws, vocabulary = 40_000, 24
    logits = _logits(1, vocabulary)
    sampler = Sampler(sampling)
    tokens = sampler.sample(
        logits.expand(draws, -1), torch.arange(draws), torch.zeros(draws, dtype=torch.long)
    )
    exact = sampler.warp(logits)[0].softmax(dim=0).double()
    counts = torch.bincount(tokens, minlength=vocabulary).double()
    assert counts[exact == 0].sum() == 0
    likely = exact * draws >= 5
    expected = exact[likely] * draws
    chi_square = float(((counts[likely] - expected) ** 2 / expected).sum())
    freedom = int(likely.sum()) - 1
    # A value above this mean plus five standard deviations is no chance.
    assert chi_square < freedom + 5 * (2 * freedom) ** 0.5 + 5


def test_a_row_draws_the_same_token_in_every_batch() -> None:
    sampler = Sampler(Sampling(temperature=1.0, top_p=0.95, seed=11))
    logits, seeds, positions = _logits(50), torch.arange(50) * 7919, torch.arange(50) % 9
    together = sampler.sample(logits, seeds, positions)
    order = torch.randperm(50, generator=torch.Generator().manual_seed(1))
    assert sampler.sample(logits[order], seeds[order], positions[order]).tolist() == together[order].tolist()
    alone = [
        int(sampler.sample(logits[i : i + 1], seeds[i : i + 1], positions[i : i + 1])) for i in range(50)
    ]
    assert alone == together.tolist()
    assert sampler.sample(logits, seeds, positions + 1).tolist() != together.tolist()


def test_the_penalty_is_that_of_transformers() -> None:
    logits, tokens = _logits(5), torch.tensor(np.random.default_rng(0).integers(0, 64, (5, 9)))
    seen = torch.zeros(5, 64, dtype=torch.bool).scatter(1, tokens, True)
    torch.testing.assert_close(
        apply_repetition_penalty(logits, seen, 1.3), RepetitionPenaltyLogitsProcessor(1.3)(tokens, logits)
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_give_no_token(temperature: float) -> None:
    logits = _logits(4)
    logits[1, 3] = float("nan")
    logits[2] = float("-inf")
    row = torch.arange(4)
    tokens = Sampler(Sampling(temperature=temperature)).sample(logits, row, row)
    assert (tokens == INVALID_TOKEN).tolist() == [False, True, True, False]


@pytest.mark.parametrize("sampling", [Sampling(), *SETTINGS], ids=str)
def test_only_allowed_tokens_are_drawn_as_if_there_were_no_others(sampling: Sampling) -> None:
    tables = TokenTables(np.arange(64, dtype=np.int32) % 4, np.array([[0] * 4, [1] * 4, [2, 0, 0, 2]]), 2, "")
    mask = AnswerMask(tables, 64, "cpu")
    logits, seeds, positions = _logits(300), torch.arange(300), torch.zeros(300, dtype=torch.long)
    free = Sampler(sampling, mask).sample(logits, seeds, positions, states=torch.ones(300, dtype=torch.int32))
    assert torch.equal(free, Sampler(sampling).sample(logits, seeds, positions))
    kept = torch.full((300,), 2, dtype=torch.int32)
    tokens = Sampler(sampling, mask).sample(logits, seeds, positions, states=kept)
    assert set((tokens % 4).tolist()) == {0, 3}
    alone = logits.masked_fill(~mask.allowed(kept), float("-inf"))
    assert torch.equal(tokens, Sampler(sampling).sample(alone, seeds, positions))


def test_a_compiled_sampler_draws_the_allowed_tokens_and_is_compiled_once() -> None:
    sampling = Sampling(temperature=1.2, seed=5)
    tables = TokenTables(np.arange(64, dtype=np.int32) % 4, np.array([[0] * 4, [1] * 4, [2, 0, 0, 2]]), 2, "")
    mask = AnswerMask(tables, 64, "cpu")
    mask._rows = None  # as on a GPU, in one piece
    plain, compiled = Sampler(sampling, mask), Sampler(sampling, mask)
    compile_sampler(compiled)
    torch._dynamo.utils.counters.clear()
    for rows in (1, 5, 40):
        given = _logits(rows), torch.arange(rows), torch.arange(rows) % 7
        states = torch.arange(rows, dtype=torch.int32) % 2 + 1
        assert torch.equal(
            compiled.sample(*given, None, None, states), plain.sample(*given, None, None, states)
        )
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
