"""Rows for `batchrun bench`: random tokens in skewed lengths, the same ones on every machine."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.protocol import Request
from batchrun.errors import JobError

# Tokens of a row, log-normal and clipped: (median, sigma, least, most).
_Lengths = tuple[float, float, int, int]
# One kind of rows, or the share of the first kind and both of them.
_Kinds = tuple[_Lengths] | tuple[float, _Lengths, _Lengths]

# name: kinds of prompts, kinds of outputs, tokens that begin every prompt
_LENGTHS: dict[str, tuple[_Kinds, _Kinds, int]] = {
    "summarise": (((450, 0.8, 16, 3000),), ((100, 0.7, 8, 600),), 0),
    "extract": (((120, 0.5, 16, 600),), ((50, 0.5, 8, 200),), 600),
    "write": (((64, 0.5, 8, 256),), ((400, 0.6, 32, 1500),), 0),
    "chat": (
        (0.6, (40, 0.6, 4, 300), (1500, 0.5, 300, 6000)),
        (0.5, (30, 0.7, 1, 200), (500, 0.5, 100, 2000)),
        0,
    ),
    "long": (((8000, 0.5, 4000, 24000),), ((150, 0.5, 16, 500),), 0),
}
WORKLOADS = tuple(_LENGTHS)


@dataclass(frozen=True, slots=True)
class Workload:
    """Rows to run: token ids, and how many tokens each is to generate, exactly. `notes` say what is not among them."""

    name: str
    prompts: list[list[int]]
    new_tokens: list[int]
    notes: tuple[str, ...] = ()

    @classmethod
    def named(cls, name: str, rows: int, vocabulary: int, seed: int = 0) -> Self:
        """One of WORKLOADS, in skewed lengths (log-normal), or a shape such as "1000/200": so many tokens in and out
        of every row. The same rows for the same seed on every machine.

        Raises:
            JobError: neither.
        """
        if name in _LENGTHS:
            prompt, new, common = _LENGTHS[name]
        elif shape := re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", name):
            (prompt, new), common = [(_all_of(int(length)),) for length in shape.groups()], 0
        else:
            raise JobError(
                f"no workload {name!r}",
                "bench",
                f"use {', '.join(WORKLOADS)}, or a shape such as 1000/200: tokens of each prompt and answer",
            )
        rng = np.random.default_rng(seed)
        prompt_lengths, new_lengths = _skewed(rng, rows, *prompt), _skewed(rng, rows, *new)
        lowest, highest = min(1000, vocabulary // 4), vocabulary - min(2000, vocabulary // 4)
        start = rng.integers(lowest, highest, common).tolist()
        prompts = [start + rng.integers(lowest, highest, length).tolist() for length in prompt_lengths]
        return cls(name, prompts, new_lengths)

    def requests(self, vocabulary: int, other_tokens: int = 0) -> list[Request]:
        """`other_tokens` makes prompts that share nothing with those of another number."""
        return [
            Request(i, (np.array(prompt, np.int32) + other_tokens) % vocabulary, new, i)
            for i, (prompt, new) in enumerate(zip(self.prompts, self.new_tokens, strict=True))
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest row, its answer included."""
        return max(len(p) + n for p, n in zip(self.prompts, self.new_tokens, strict=True))

    @property
    def common(self) -> int:
        """Tokens that begin every prompt."""
        # In the order of tokens, so that all others are between.
        first, last = min(self.prompts), max(self.prompts)
        return next(
            (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
            min(len(first), len(last)),
        )


def _all_of(length: int) -> _Lengths:
    return length, 0.0, length, length


def _skewed(rng: np.random.Generator, count: int, *kinds: Any) -> list[int]:
    """Lengths of `count` rows of the _Kinds."""
    if len(kinds) == 1:
        return [int(x) for x in _drawn(rng, count, *kinds[0])]
    share, one, other = kinds
    is_one = rng.random(count) < share
    return [int(x) for x in np.where(is_one, _drawn(rng, count, *one), _drawn(rng, count, *other))]


def _drawn(
    rng: np.random.Generator, count: int, median: float, sigma: float, least: int, most: int
) -> NDArray[np.float64]:
    return np.clip(np.round(np.exp(rng.normal(np.log(median), sigma, count))), least, most)
