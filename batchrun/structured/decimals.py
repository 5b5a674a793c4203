"""Automata for JSON numbers between bounds, as `json.dumps` writes them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from decimal import Decimal
from functools import cache
from typing import NamedTuple

from batchrun.structured.automaton import Automaton, build, either, embed, explore
from batchrun.structured.regex import pattern

INT64 = (-(1 << 63), (1 << 63) - 1)

# Python writes a float below 1e16 with all its digits, from 1e-4 on, which takes at most 17 + 3 behind the point.
# Whole numbers may be as long as an int64.
_FRACTION_DIGITS = 20
_PLAIN = Decimal("9999999999999999999")
_HUGE_FROM = Decimal("1e16")
_SMALLEST_PLAIN = Decimal("1e-4")
_LARGEST = Decimal("1e308")
_MANTISSA = r"[1-9](\.\d{1,16})?"
_TINY = rf"{_MANTISSA}e-(0[5-9]|[1-9]\d|[12]\d\d|3[01]\d|32[0-3])"
_HUGE = rf"{_MANTISSA}e\+(1[6-9]|[2-9]\d|[12]\d\d|30[0-7])"

_BYTES = b"-.0123456789"
_ZERO = ord("0")


class Bound(NamedTuple):
    """A limit, itself among the numbers or not."""

    value: Decimal
    inclusive: bool = True


class _Digits(NamedTuple):
    """What is read of a number: `phase` is sign, whole, point or fraction; `length` digits of it, and whether they were
    all zero. `order` is how they compare to each bound: below (-1), the same so far (0) or above (1). `rest` is the
    remainder of the whole part."""

    phase: str
    negative: bool
    length: int
    zero: bool
    order: tuple[int, ...]
    rest: int


@cache
def integers(low: int, high: int, multiple: int = 1) -> Automaton:
    """Whole numbers from `low` to `high` that are multiples of `multiple`."""
    return _between([Bound(Decimal(low)), Bound(Decimal(high))], multiple, fraction_digits=0)


@cache
def numbers(low: Bound | None, high: Bound | None) -> Automaton:
    """Decimals below 1e308, with an exponent where a float has one; tiny or huge ones only where all are allowed."""
    # A bound beyond what is written with all digits is none here; the exponents see to it.
    plain = [
        _for_floats(low, math.inf) if low else Bound(-_PLAIN - 1),
        _for_floats(high, -math.inf) if high else Bound(_PLAIN + 1),
    ]
    plain = [Bound(max(-_PLAIN - 1, min(_PLAIN + 1, b.value)), b.inclusive) for b in plain]
    found = [_between(plain, 1, _FRACTION_DIGITS)]

    def all_between(first: Decimal, last: Decimal) -> bool:
        return (low is None or low.value <= first) and (high is None or high.value >= last)

    for first, last, text in (
        (Decimal(0), _SMALLEST_PLAIN, _TINY),
        (-_SMALLEST_PLAIN, Decimal(0), f"-{_TINY}"),
        (_HUGE_FROM, _LARGEST, _HUGE),
        (-_LARGEST, -_HUGE_FROM, f"-{_HUGE}"),
    ):
        if all_between(first, last):
            found.append(pattern(text))
    return found[0] if len(found) == 1 else build(either(*map(embed, found)))


def _for_floats(bound: Bound, inwards: float) -> Bound:
    """The outermost decimal that is still within the bound once it is read as a float.

    0.50000000000000000001 is above 0.5, and becomes 0.5.
    """
    nearest = float(bound.value)
    written = Decimal(repr(nearest))
    same = bound.value in (written, Decimal(nearest))
    if same and bound.inclusive:
        return bound
    if same or _sign(Decimal(nearest) - bound.value) != _sign(inwards):
        written = Decimal(repr(math.nextafter(nearest, inwards)))
    return Bound(written)


def _between(bounds: list[Bound], multiple: int, fraction_digits: int) -> Automaton:
    """From the first bound to the second, without exponents."""
    digits = [_digits_of(bound.value) for bound in bounds]
    longest = max(len(whole) for whole, _ in digits)

    def step(state: _Digits, byte: int) -> _Digits | None:
        phase, negative, count, zero, order, rest = state
        if byte == ord("-"):
            return state._replace(phase="whole", negative=True) if phase == "sign" else None
        if byte == ord("."):
            if phase != "whole" or not count or not fraction_digits:
                return None
            return state._replace(phase="point", length=0, order=_whole_order(state))
        digit = byte - _ZERO
        if phase in ("sign", "whole"):
            if count == longest or (count == 1 and zero):
                return None
            place = [whole[count] if count < len(whole) else 0 for whole, _ in digits]
            order = tuple(o or _sign(digit - p) for o, p in zip(order, place, strict=True))
            rest = (rest * 10 + digit) % multiple
            return _Digits("whole", negative, count + 1, zero and digit == 0, order, rest)
        if count == fraction_digits:
            return None
        place = [fraction[count] if count < len(fraction) else 0 for _, fraction in digits]
        order = tuple(o or _sign(digit - p) for o, p in zip(order, place, strict=True))
        return _Digits("fraction", negative, count + 1, zero and digit == 0, order, rest)

    def _whole_order(state: _Digits) -> tuple[int, ...]:
        """As many digits compare as they stand; more of them are more."""
        return tuple(
            _sign(state.length - len(whole)) or order
            for order, (whole, _) in zip(state.order, digits, strict=True)
        )

    def accepts(state: _Digits) -> bool:
        if state.phase in ("sign", "point") or not state.length or state.rest:
            return False
        if state.negative and state.zero:
            # -0 is 0; JSON has -0.0, which a float keeps.
            return (
                bool(fraction_digits)
                and state.phase == "fraction"
                and all(_signed_order(0, bound) in _allowed(i, bound) for i, bound in enumerate(bounds))
            )
        order = _whole_order(state) if state.phase == "whole" else state.order
        if state.phase == "fraction":
            # Digits of the bound that are still to come make it larger.
            order = tuple(
                o or (-1 if any(fraction[state.length :]) else 0)
                for o, (_, fraction) in zip(order, digits, strict=True)
            )
        else:
            order = tuple(
                o or (-1 if any(fraction) else 0) for o, (_, fraction) in zip(order, digits, strict=True)
            )
        for i, (bound, size) in enumerate(zip(bounds, order, strict=True)):
            below_zero = bound.value < 0
            if state.negative != below_zero and not (state.zero and bound.value == 0):
                compared = -1 if state.negative else 1
            else:
                compared = -size if state.negative else size
            if compared not in _allowed(i, bound):
                return False
        return True

    start = _Digits("sign", False, 0, True, (0,) * len(bounds), 0)
    return explore(start, step, accepts, _BYTES)


def _allowed(side: int, bound: Bound) -> tuple[int, ...]:
    """How a number may compare to the lower (0) or the upper (1) bound."""
    beyond = 1 if side == 0 else -1
    return (beyond, 0) if bound.inclusive else (beyond,)


def _signed_order(value: int, bound: Bound) -> int:
    return _sign(value - bound.value)


def _digits_of(value: Decimal) -> tuple[list[int], list[int]]:
    """The digits before and behind the point, of the absolute value; 0 has one digit before it."""
    text = format(abs(value), "f")
    whole, _, fraction = text.partition(".")
    return [int(c) for c in whole], [int(c) for c in fraction.rstrip("0")]


def _sign(number: float | Decimal) -> int:
    return (number > 0) - (number < 0)


def decimal(value: float | int) -> Decimal:
    """A bound of a schema, as it is written there."""
    return Decimal(value) if isinstance(value, int) else Decimal(repr(value))


def tightest(bounds: Iterable[Bound], upper: bool) -> Bound | None:
    """The bound that allows least."""
    return min(bounds, key=lambda b: (b.value if upper else -b.value, b.inclusive), default=None)
