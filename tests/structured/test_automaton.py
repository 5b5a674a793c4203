"""Automata over bytes: minimal, exact for UTF-8, intersected, bounded in size."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchrun.structured.automaton import TooLarge, build, either, embed, intersect, literal, repeat
from batchrun.structured.characters import ALL, utf8

A_OR_BB = repeat(either(literal(b"a"), literal(b"bb")), 0, None)


def test_equal_ends_share_their_states() -> None:
    # dead, start, one behind a letter, the end.
    assert build(either(literal(b"ax"), literal(b"bx"), literal(b"cx"))).states == 4
    assert build(embed(build(repeat(literal(b"a"), 0, None)))).states == 2


@given(st.text(alphabet="abc", max_size=8))
def test_an_intersection_has_what_both_have(text: str) -> None:
    one, other = build(A_OR_BB), build(repeat(utf8(((0x61, 0x62),)), 2, 5))
    both = intersect(one, other)
    assert both.matches(text.encode()) == (one.matches(text.encode()) and other.matches(text.encode()))


@given(st.binary(max_size=5))
def test_only_valid_utf_8_is_text(data: bytes) -> None:
    try:
        data.decode()
        valid = True
    except UnicodeDecodeError:
        valid = False
    assert build(repeat(utf8(ALL), 0, None)).matches(data) == valid


@given(st.characters(), st.integers(0, 0x10FFFF), st.integers(0, 0x10FFFF))
def test_a_range_of_characters_is_those_and_no_others(char: str, low: int, high: int) -> None:
    text = char.encode("utf-8", "surrogatepass")
    surrogate = 0xD800 <= ord(char) <= 0xDFFF
    automaton = build(utf8(((min(low, high), max(low, high)),)))
    assert automaton.matches(text) == (min(low, high) <= ord(char) <= max(low, high) and not surrogate)


def test_an_answer_is_closed_where_nothing_can_follow() -> None:
    automaton = build(either(literal(b"no"), literal(b"nobody")))
    states = automaton.run([b"n", b"no", b"nobody", b"x"])
    assert automaton.accepting[states].tolist() == [False, True, True, False]
    assert automaton.closed[states].tolist() == [False, False, True, False]


def test_what_would_take_too_many_states_is_told_early() -> None:
    exponential = (utf8(((0x61, 0x62),)), literal(b"a"))

    def suffix(nfa: object, begin: int, end: int) -> None:
        from batchrun.structured.automaton import concat

        loop, last = repeat(exponential[0], 0, None), repeat(exponential[0], 20, 20)
        concat(loop, exponential[1], last)(nfa, begin, end)

    with pytest.raises(TooLarge):
        build(suffix)
