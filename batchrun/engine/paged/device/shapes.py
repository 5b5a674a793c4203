"""Sizes that work is rounded to, so that few are compiled and captured, and the layout of a decode batch's inputs."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from batchrun.engine.paged.attention.cascade import ITEM_WIDTH, MAX_ITEMS, MEMBER_WIDTH, max_results
from batchrun.engine.paged.attention.metadata import LONG_SEQLEN, SHORT_SEQLEN, SharedPrefixes, Spans

FEW_ITEMS = 32

_BATCH_SIZES = (2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, 1025, 64))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a captured decode step is made for: sequences, pages of each, and pieces of prefixes that are read once for
    several sequences, if there are any, in blocks of so many queries."""

    batch_size: int
    pages: int
    items: int = 0
    block_queries: int = 0


@dataclass(frozen=True, slots=True)
class Inputs:
    """A decode batch's inputs, all of them int32: slots (sequences,); block tables (sequences, pages); and where there
    are shared prefixes, `SharedPrefixes` in members and items of fixed numbers."""

    slots: Tensor
    block_tables: Tensor
    starts: Tensor
    members: Tensor
    items: Tensor

    @classmethod
    def of(cls, flat: Tensor, shape: Shape) -> Inputs:
        """Views of one buffer."""
        parts = torch.split(flat, _counts(shape))
        return cls(*(part.view(size) for part, size in zip(parts, _sizes(shape), strict=True)))

    def shared_prefixes(self, shape: Shape) -> SharedPrefixes | None:
        """What groups of the sequences begin with, where the shape is made for some."""
        if not shape.items:
            return None
        results = max_results(shape.batch_size)
        return SharedPrefixes(self.starts, self.members, self.items, shape.block_queries, results)


def input_size(shape: Shape) -> int:
    """Numbers that `Inputs` lays out."""
    return sum(_counts(shape))


def _sizes(shape: Shape) -> list[tuple[int, ...]]:
    grouped = shape.batch_size if shape.items else 0
    return [
        (shape.batch_size,),
        (shape.batch_size, shape.pages),
        (grouped,),
        (grouped, MEMBER_WIDTH),
        (shape.items, ITEM_WIDTH),
    ]


def _counts(shape: Shape) -> list[int]:
    return [math.prod(size) for size in _sizes(shape)]


def item_bucket(items: int) -> int:
    """Pieces of prefixes that a captured step is made for: empty ones take next to no time, a capture does."""
    return FEW_ITEMS if items <= FEW_ITEMS else MAX_ITEMS


def bucket(batch_size: int) -> int:
    """Sequences that a captured step is made for: from 16 on at most a third more than wanted, mostly an eighth, and
    few different numbers."""
    fitting = [size for size in _BATCH_SIZES if size >= batch_size]
    return fitting[0] if fitting else -(-batch_size // 128) * 128


def query_spans(query_lens: list[int]) -> Spans:
    """Which sequences of a prefill batch attention computes together.

    Documents and short questions about them in one grid would have each question take a document's blocks, nearly all
    of them for nothing. `query_lens` are in falling order of `length_kind` but for the last, which is padding.
    """
    kinds = [length_kind(tokens) for tokens in query_lens[:-1]]
    changes = [i for i in range(1, len(kinds)) if kinds[i] != kinds[i - 1]]
    bounds = itertools.pairwise([0, *changes, len(query_lens)])
    return [(first, stop, max(query_lens[first:stop])) for first, stop in bounds]


def length_kind(tokens: int) -> int:
    """Of a sequence with so many tokens in a prefill batch: 0 if it is short, 2 if it is long."""
    return (tokens >= SHORT_SEQLEN) + (tokens >= LONG_SEQLEN)


def round_tokens(tokens: int) -> int:
    """Up to a multiple of 8 and of about a hundredth: a number of tokens that products have not met before costs the
    host some ten milliseconds for each prefill batch, and 1% more tokens cost less."""
    step = max(8, power_of_two(tokens) // 64)
    return -(-tokens // step) * step


def power_of_two(number: int) -> int:
    """The first one that is not below `number`."""
    return 1 << (number - 1).bit_length()
