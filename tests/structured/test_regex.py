"""Regular expressions against Python's own; what is not regular is refused by its name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.structured.characters import json_string
from batchrun.structured.regex import NotRegular, pattern

PATTERNS = [
    r"^[A-Z]{2}\d{3}$", r"a|b+c", r"^(foo|bar)?x{2,4}[^0-9a-f]$", r"\w+@\w+\.com", r"(^a|b$)", r"^$", r"", r"[\w.-]+",
    r"^\s*\S+\s*$", r"é+[à-ü]", r"^(?:a(?P<n>b)*){1,3}$", r"\$\{x\}", r"[^\]]+$", r"^.{2,3}$", r"a{2}?b*?", r"[a\-c]\.",
]  # fmt: skip
TEXTS = st.text(alphabet='abcxfoor019 @.com-_éàü]{}$,ABZ\u0663"\\3', max_size=8)


@settings(max_examples=150)
@given(st.sampled_from(PATTERNS), TEXTS)
def test_a_pattern_matches_what_python_finds(expression: str, text: str) -> None:
    plain = pattern(expression, search=True).matches(text.encode())
    quoted = pattern(expression, json_string, search=True)
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    found = re.search(expression, text) is not None
    assert quoted.matches(escaped.encode()) == plain
    assert found or not plain
    if text.isascii() or not re.search(r"\\[dwsDWS]", expression):
        assert plain == found


def test_a_whole_expression_is_matched_from_begin_to_end() -> None:
    assert pattern(r"[ab]c").matches(b"bc")
    assert not pattern(r"[ab]c").matches(b"bcc")


@pytest.mark.parametrize(
    ("expression", "what"),
    [
        (r"(?=a)b", "look-ahead"),
        (r"(?<!a)b", "look-behind"),
        (r"(a)\1", "back-reference"),
        (r"a++", "possessive"),
        (r"\bx", "word boundary"),
        (r"(?i)a", "flag"),
        (r"a^b", "in the middle"),
        (r"[[:alpha:]]", "POSIX"),
        (r"\p{L}", "\\\\p"),
        (r"a{,3}", "dialects"),
        (r"a**", "repeated quantifier"),
        (r"(a", "without its"),
        (r"a)", "without its"),
        (r"[a", "without its"),
        (r"*a", "nothing to repeat"),
        (r"[z-a]", "range"),
    ],
)
def test_what_is_not_regular_is_named(expression: str, what: str) -> None:
    with pytest.raises(NotRegular, match=what):
        pattern(expression, search=True)
