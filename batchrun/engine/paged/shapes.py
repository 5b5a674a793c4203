"""Sizes that work is rounded to, so that few are compiled and captured, and the layout of a decode batch's inputs."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

_BATCH_SIZES = (2, 4, 8, *range(16, 64, 8), *range(64, 256, 16), *range(256, 512, 32), *range(512, 1025, 64))


@dataclass(frozen=True, slots=True)
class Shape:
    """What a captured decode step is made for: sequences, pages of each, and pages that all of them share."""

    batch_size: int
    pages: int
    prefix_pages: int


def views(flat: Tensor, shape: Shape) -> tuple[Tensor, Tensor, Tensor]:
    """A decode batch's inputs: slots (sequences,); 0, the shared prefix's tokens, 0, sequences, and the prefix's pages;
    block tables (sequences, pages)."""
    begin, end = shape.batch_size, shape.batch_size + 4 + shape.prefix_pages
    return flat[:begin], flat[begin:end], flat[end : input_size(shape)].view(shape.batch_size, shape.pages)


def input_size(shape: Shape) -> int:
    """Numbers that `views` lays out."""
    return shape.batch_size + 4 + shape.prefix_pages + shape.batch_size * shape.pages


def bucket(batch_size: int) -> int:
    """Sequences that a captured step is made for: from 16 on at most a third more than wanted, mostly an eighth, and
    few different numbers."""
    fitting = [size for size in _BATCH_SIZES if size >= batch_size]
    return fitting[0] if fitting else -(-batch_size // 128) * 128


def round_tokens(tokens: int) -> int:
    """Up to a multiple of 8 and of about a hundredth: a number of tokens that products have not met before costs the
    host some ten milliseconds for each prefill batch, and 1% more tokens cost less."""
    step = max(8, power_of_two(tokens) // 64)
    return -(-tokens // step) * step


def power_of_two(number: int) -> int:
    """The first one that is not below `number`."""
    return 1 << (number - 1).bit_length()
