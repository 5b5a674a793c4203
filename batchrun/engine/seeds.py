"""Rows' numbers that stand for a seed of their own, or for one of several samples of a row.

`batchrun.engine.tokens.noise` makes the noise of a token out of (seed, row, position). A row's own seed is folded into
the row's number here, so that engines know one seed and a number for each row.
"""

from __future__ import annotations

MASK = (1 << 64) - 1
GOLDEN = 0x9E3779B97F4A7C15


def mixed(x: int) -> int:
    """The 64-bit finalizer of SplitMix64 (Steele, Lea and Flood, 2014): every input bit moves every output bit."""
    x &= MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & MASK
    return x ^ (x >> 31)


def of_sample(row_seed: int, sample: int) -> int:
    """The number of one of a row's samples; the first one's is the row's, so that more samples change none."""
    return mixed(mixed(row_seed) + sample * GOLDEN) if sample else row_seed


def of_seed(row_seed: int, own: int, seed: int) -> int:
    """The number that gives a row, under the job's `seed`, the noise that `row_seed` has under the seed `own`."""
    return row_seed if own == seed else (row_seed ^ mixed(own + GOLDEN) ^ mixed(seed + GOLDEN)) & MASK
