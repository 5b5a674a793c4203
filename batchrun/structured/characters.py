"""Sets of characters, and the bytes that write them: plain UTF-8, or as JSON strings have them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from functools import cache

from batchrun.structured.automaton import Piece, sequences

Characters = tuple[tuple[int, int], ...]
"""Ranges of code points, ascending, disjoint, both ends included."""

Encoding = Callable[[Characters], Piece]

# Surrogates are no characters: UTF-8 has no bytes for them (RFC 3629).
ALL: Characters = ((0, 0xD7FF), (0xE000, 0x10FFFF))

_LAST_OF_LENGTH = (0x7F, 0x7FF, 0xFFFF, 0x10FFFF)
# What JSON has a short escape for; all other control characters are left out of JSON strings.
_ESCAPED = '"\\\b\f\n\r\t'


def normal(ranges: Iterable[tuple[int, int]]) -> Characters:
    """The union of ranges in any order."""
    merged: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if merged and low <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(high, merged[-1][1]))
        else:
            merged.append((low, high))
    return tuple(merged)


def common(one: Characters, other: Characters) -> Characters:
    """The intersection."""
    return normal((max(a, c), min(b, d)) for a, b in one for c, d in other if max(a, c) <= min(b, d))


def without(one: Characters, other: Characters) -> Characters:
    """The characters of `one` that are not in `other`."""
    gaps, after = [], 0
    for low, high in other:
        if after < low:
            gaps.append((after, low - 1))
        after = high + 1
    return common(one, (*gaps, (after, 0x10FFFF)) if after <= 0x10FFFF else tuple(gaps))


def of(text: str) -> Characters:
    """The characters of a text."""
    return normal((ord(c), ord(c)) for c in text)


@cache
def unicode_class(letter: str) -> Characters:
    r"""All of Unicode that \d, \w or \s matches in any dialect."""
    belongs = {
        "d": str.isdecimal,
        "w": lambda c: c.isalnum() or c == "_",
        "s": str.isspace,
    }[letter]
    # What JavaScript calls white space and Python does not.
    more = [(0xFEFF, 0xFEFF)] if letter == "s" else []
    return normal([*((p, p) for p in range(0x110000) if belongs(chr(p))), *more])


def utf8(characters: Characters) -> Piece:
    """One of the characters, in UTF-8."""
    return sequences(s for low, high in common(characters, ALL) for s in _utf8_ranges(low, high))


def json_string(characters: Characters) -> Piece:
    """One of the characters, as it stands in a JSON string: as itself, or as the short escape it must have."""
    plain = without(common(characters, ((0x20, 0x10FFFF),)), of(_ESCAPED))
    escapes = [c for c in _ESCAPED if common(characters, of(c))]
    return sequences(
        [
            *(s for low, high in common(plain, ALL) for s in _utf8_ranges(low, high)),
            *(tuple((b, b) for b in json.dumps(c)[1:-1].encode()) for c in escapes),
        ]
    )


def _utf8_ranges(low: int, high: int) -> Iterator[tuple[tuple[int, int], ...]]:
    """The UTF-8 of a range of code points, as sequences of byte ranges."""
    for last in _LAST_OF_LENGTH:
        if low <= last < high:
            yield from _utf8_ranges(low, last)
            low = last + 1
    for shift in (6, 12, 18):
        block = (1 << shift) - 1
        if high <= _LAST_OF_LENGTH[0] or low & ~block == high & ~block:
            continue
        # Cut off what is not whole blocks of continuation bytes.
        if low & block:
            yield from _utf8_ranges(low, low | block)
            yield from _utf8_ranges((low | block) + 1, high)
            return
        if high & block != block:
            yield from _utf8_ranges(low, (high & ~block) - 1)
            yield from _utf8_ranges(high & ~block, high)
            return
    if low <= high:
        yield tuple(zip(chr(low).encode(), chr(high).encode(), strict=True))
