"""Sampling noise that belongs to the row, never to the batch.

Adding Gumbel noise to log-probabilities and taking the largest draws exactly from their softmax (the
Gumbel-max trick; Maddison, Tarlow and Minka, "A* Sampling", 2014). The noise comes from a counter-based
generator in the sense of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011): a hash of
(seed, row, position, token) with no state, so that a resumed or re-batched run draws the same tokens.
Integers alone decide the random bits, so a CPU and a GPU agree on them; only the last logarithms may differ
in the last place.
"""

from __future__ import annotations

import torch
from torch import Tensor


def gumbel(seed: int, row_seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """Standard Gumbel noise for one generated position of each row.

    Args:
        seed: the job's, a signed 64-bit number.
        row_seeds: int64 (batch,), the rows' own numbers.
        positions: int64 (batch,), the index of the generated token, 0 for the first new one.
        vocab: how many tokens there are to choose from.

    Returns:
        float32 (batch, vocab) on the device of `row_seeds`, finite, between -2.9 and 22.2. A longer
        vocabulary leaves the noise of the tokens before it unchanged.
    """
    key = _mix64(torch.full_like(row_seeds, seed) + signed(0x9E3779B97F4A7C15))
    key = _mix64(_mix64(key ^ row_seeds) + positions)
    low, high = key.to(torch.int32).unsqueeze(1), (key >> 32).to(torch.int32).unsqueeze(1)
    tokens = torch.arange(vocab, dtype=torch.int32, device=row_seeds.device)
    bits = _mix32(_mix32(tokens ^ low) ^ high)
    # 31 bits, finest near 0, where the large noise comes from: tails are drawn as they should, down to 2^-32.
    # Values that round to 1 would give minus infinity, and a row's only candidate must stay finite.
    uniform = (((bits & 0x7FFFFFFF).to(torch.float32) + 0.5) * 2.0**-31).clamp(max=1 - 2.0**-24)
    return -torch.log(-torch.log1p(-uniform))


def _mix32(x: Tensor) -> Tensor:
    """Bijection on int32 in which every input bit moves every output bit ("lowbias32", C. Wellons, 2018)."""
    x = (x ^ _shift(x, 16, 32)) * 0x7FEB352D
    x = (x ^ _shift(x, 15, 32)) * signed(0x846CA68B, 32)
    return x ^ _shift(x, 16, 32)


def _mix64(x: Tensor) -> Tensor:
    """The same on int64: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ _shift(x, 30, 64)) * signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shift(x, 27, 64)) * signed(0x94D049BB133111EB)
    return x ^ _shift(x, 31, 64)


def _shift(x: Tensor, by: int, width: int) -> Tensor:
    """Logical right shift: torch's own keeps the sign."""
    return (x >> by) & ((1 << (width - by)) - 1)


def signed(number: int, width: int = 64) -> int:
    """The signed number of the same `width` bits: torch has no unsigned ones to compute with."""
    number &= (1 << width) - 1
    return number - (1 << width) if number >> (width - 1) else number
