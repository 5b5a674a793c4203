"""The automata of JSON strings: bounded, with patterns, of a format."""

from __future__ import annotations

from functools import cache, reduce

from batchrun.structured import regex
from batchrun.structured.automaton import Automaton, Piece, build, concat, embed, intersect, literal, repeat
from batchrun.structured.characters import ALL, json_string
from batchrun.structured.facts import canonical, refusal
from batchrun.structured.nodes import String
from batchrun.structured.regex import NotRegular

# Year 1 to 9999, as Python and Arrow have it; 29 February only in leap years.
_YEAR = r"(\d{3}[1-9]|\d\d[1-9]0|\d[1-9]00|[1-9]000)"
_LEAP_YEAR = r"(\d\d(0[48]|[2468][048]|[13579][26])|(0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"({_YEAR}-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    rf"|{_LEAP_YEAR}-02-29)"
)
_TIME = r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"

# An offset must not lead out of the years that Python and pandas know.
_NOT_AT_THE_ENDS = r".*Z|([1-8]\d{3}|0([1-9]\d\d|0([1-9]\d|0[02-9]))|9([0-8]\d\d|9([0-8]\d|9[0-8]))).*"

FORMATS = {
    "date": (_DATE,),
    "date-time": (f"{_DATE}T{_TIME}", _NOT_AT_THE_ENDS),
    "time": (_TIME,),
    "uuid": (r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}",),
}
"""Patterns that a text of the format has, all of them."""


def string(node: String) -> Piece:
    """The string, with its quotes."""
    if node.patterns or node.formats:
        content = embed(_content(node.least, node.most, node.patterns, node.formats, node.where))
    else:
        content = repeat(json_string(ALL), node.least, node.most)
    return concat(literal(b'"'), content, literal(b'"'))


def matches(node: String, text: str) -> bool:
    """Whether the text is one that the node allows."""
    content = _content(node.least, node.most, node.patterns, node.formats, node.where)
    return content.matches(canonical(text)[1:-1].encode())


@cache
def _content(
    least: int, most: int | None, patterns: tuple[str, ...], formats: tuple[str, ...], where: str
) -> Automaton:
    found = [regex.pattern(one, json_string) for name in formats for one in FORMATS[name]]
    for one in patterns:
        try:
            found.append(regex.pattern(one, json_string, search=True))
        except NotRegular as error:
            fix = "leave it out, or see the README for what a pattern may have"
            raise refusal(f"pattern {one!r} has {error}", where, fix) from None
    if least or most is not None or not found:
        found.append(build(repeat(json_string(ALL), least, most)))
    return reduce(intersect, found)
