"""The sampling noise: reproducible, independent of the batch, and of the right distribution."""

from __future__ import annotations

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.tokens.noise import gumbel

INT64 = st.integers(-(2**63), 2**63 - 1)


@settings(max_examples=50)
@given(seed=INT64, rows=st.lists(st.tuples(INT64, st.integers(0, 10**6)), min_size=1, max_size=8))
def test_a_rows_noise_is_the_same_in_every_batch(seed, rows):
    row_seeds, positions = (torch.tensor(column) for column in zip(*rows, strict=True))
    together = gumbel(seed, row_seeds, positions, 50)
    for i in range(len(rows)):
        alone = gumbel(seed, row_seeds[i : i + 1], positions[i : i + 1], 50)
        assert torch.equal(together[i : i + 1], alone)


@settings(max_examples=50)
@given(seed=INT64, row_seed=INT64, position=st.integers(0, 10**6))
def test_noise_is_finite_and_a_longer_vocabulary_only_adds_to_it(seed, row_seed, position):
    short, long = (gumbel(seed, torch.tensor([row_seed]), torch.tensor([position]), n) for n in (100, 1000))
    assert torch.isfinite(long).all()
    assert torch.equal(short, long[:, :100])


def test_noise_follows_the_gumbel_distribution():
    noise = gumbel(7, torch.arange(1000), torch.zeros(1000, dtype=torch.int64), 1000).double().flatten()
    counts = torch.histc(torch.exp(-torch.exp(-noise)), 100, 0, 1)  # its own distribution function: uniform
    chi_square = ((counts - 10_000) ** 2 / 10_000).sum().item()
    assert abs(chi_square - 99) < 5 * math.sqrt(2 * 99)
    assert noise.max() > 12  # P(all of a million below 12) = exp(-1e6 * exp(-12)) = 0.2%


def test_neighbouring_seeds_rows_and_positions_are_independent():
    zeros, counting = torch.zeros(200, dtype=torch.int64), torch.arange(200)
    by_row, by_position = gumbel(0, counting, zeros, 2000), gumbel(0, zeros, counting, 2000)
    by_seed = torch.cat([gumbel(seed, zeros[:1], zeros[:1], 2000) for seed in range(200)])
    for noise in (by_row, by_position, by_seed, by_row[:, :200].T):
        correlation = torch.corrcoef(noise) - torch.eye(200)
        # 20,000 pairs: the largest of as many independent ones is about 4.2 / sqrt(values).
        assert correlation.abs().max() < 5.5 / math.sqrt(noise.shape[1])


def test_every_input_changes_the_noise():
    def draw(seed: int, row_seed: int, position: int) -> torch.Tensor:
        return gumbel(seed, torch.tensor([row_seed]), torch.tensor([position]), 100)

    noises = [
        draw(*inputs) for inputs in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, -1, 0), (2**62, 0, 0)]
    ]
    for i, one in enumerate(noises):
        assert not any(torch.equal(one, other) for other in noises[:i])
