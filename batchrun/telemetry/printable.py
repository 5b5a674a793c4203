"""Text from data, file names and other programs, made safe for a terminal."""

from __future__ import annotations

import re

# What a terminal acts on, or does not show, instead of printing it: control characters (C0, DEL, C1), soft hyphen,
# zero-width and direction-changing characters, line and paragraph separators, other invisible format characters, lone
# surrogates and language tags.
_UNPRINTABLE = re.compile(
    "[\x00-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f"
    "\u3164\ud800-\udfff\ufeff\uffa0\ufff9-\ufffb\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def printable(text: str, newlines: bool = False) -> str:
    """The text with every character that a terminal would act on, or hide, written out: `\\x1b`, `\\u202e`.

    Newlines are written as ⏎, or stay with `newlines`. Tell Rich with `markup=False`, or by a `Text`, that it is no
    markup either.
    """
    return _UNPRINTABLE.sub(lambda match: _written_out(match[0], newlines), text)


def counted(count: int, noun: str) -> str:
    """So many of something: 1 part, 1,200 parts."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"


def _written_out(character: str, newlines: bool) -> str:
    if character == "\n":
        return character if newlines else "⏎"
    return repr(character)[1:-1]
