"""Numbers between bounds, in every way that `json.dumps` writes them."""

from __future__ import annotations

import json
from decimal import Decimal

from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.structured.decimals import INT64, Bound, decimal, integers, numbers


@given(st.integers(*INT64))
def test_every_int64_can_be_written(value: int) -> None:
    assert integers(*INT64).matches(str(value).encode())


def test_what_int64_does_not_hold_cannot_be_written() -> None:
    for text in (str(1 << 63), str(-(1 << 63) - 1), "-0", "00", "01", "-", "", "1.0"):
        assert not integers(*INT64).matches(text.encode()), text


@given(st.integers(-1200, 1200), st.integers(0, 5000), st.integers(1, 12), st.integers(-10000, 10000))
def test_integers_keep_their_bounds_and_multiples(low: int, size: int, multiple: int, value: int) -> None:
    allowed = low <= value <= low + size and value % multiple == 0
    assert integers(low, low + size, multiple).matches(str(value).encode()) == allowed


@given(st.floats(-1e307, 1e307, allow_subnormal=False))
def test_every_float_can_be_written(value: float) -> None:
    assert numbers(None, None).matches(json.dumps(value).encode())


def test_no_number_is_beyond_a_float() -> None:
    for text in ("1e309", "1" * 400, "01", "-", "1.", ".5", "1e5000"):
        assert not numbers(None, None).matches(text.encode()), text


BOUNDS = st.decimals(-100, 100, places=2).map(float)


@settings(max_examples=80)
@given(BOUNDS, st.sampled_from([0.0, 0.01, 0.5, 7.0]), st.booleans(), st.booleans(), st.floats(-100, 100))
def test_numbers_keep_their_bounds(low: float, size: float, closed: bool, near: bool, value: float) -> None:
    high = low + size
    automaton = numbers(Bound(decimal(low), closed), Bound(decimal(high), closed))
    value = low + value / 1000 if near else value
    allowed = low <= value <= high if closed else low < value < high
    # Between bounds, numbers that are written with an exponent are there where all of them are.
    if "e" not in repr(value):
        assert automaton.matches(json.dumps(value).encode()) == allowed


def test_digits_that_a_float_loses_do_not_lead_over_a_bound() -> None:
    above = numbers(Bound(Decimal("0.5"), False), None)
    assert not above.matches(b"0.50000000000000000001")
    assert above.matches(b"0.5000000000000001")
    unit = numbers(Bound(Decimal(0)), Bound(Decimal(1)))
    assert all(unit.matches(text) for text in (b"0", b"1", b"1.0", b"0.25", b"1e-05", b"-0.0"))
    assert not any(unit.matches(text) for text in (b"1.00000000001", b"-0.1", b"-0", b"1e+16"))
