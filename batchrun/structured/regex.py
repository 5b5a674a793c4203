r"""Regular expressions: the regular part of what Python and JavaScript both know, as automata over bytes.

Literals, `.`, `[...]`, `\d \w \s \D \W \S`, escapes (`\n \t \r \f \v \xHH \uHHHH`, any punctuation), groups with and
without a name, `|`, `* + ? {m} {m,} {m,n}` (lazy or not, which is the same here), and `^ $` at either end.
Where the two dialects differ, only what both match is generated: `\d \w \s` are those of ASCII, `\D \W \S` no
character that is a digit, letter or white space anywhere in Unicode, and `.` no end of line of either.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from batchrun.structured import characters
from batchrun.structured.automaton import Automaton, Piece, build, concat, either, repeat
from batchrun.structured.characters import ALL, Characters, Encoding, normal, utf8, without

MAX_REPEAT = 32_000

_ASCII = {
    "d": ((0x30, 0x39),),
    "w": ((0x30, 0x39), (0x41, 0x5A), (0x5F, 0x5F), (0x61, 0x7A)),
    "s": ((0x09, 0x0D), (0x20, 0x20)),
}
_CONTROL = {"n": "\n", "t": "\t", "r": "\r", "f": "\f", "v": "\v", "0": "\0"}
_ANY = without(ALL, characters.of("\n\r\u2028\u2029"))
_QUANTIFIER = re.compile(r"\{(\d+)(,?)(\d*)\}|\{,\d*\}")
_HEX = {"x": 2, "u": 4, "U": 8}
_UNSUPPORTED = {
    "?=": "look-ahead",
    "?!": "look-ahead",
    "?<=": "look-behind",
    "?<!": "look-behind",
    "?P=": "a back-reference",
    "?(": "a condition",
    "?>": "an atomic group",
    "?#": "a comment",
}


class NotRegular(Exception):
    """What of the expression is not supported, in words."""


@dataclass(frozen=True)
class Chars:
    """One character of a set."""

    ranges: Characters


@dataclass(frozen=True)
class Anchor:
    """The begin (^) or the end ($) of the text."""

    sign: str


@dataclass(frozen=True)
class Concat:
    """One after the other."""

    parts: tuple[Node, ...]


@dataclass(frozen=True)
class Either:
    """Any of several."""

    options: tuple[Node, ...]


@dataclass(frozen=True)
class Repeat:
    """A part several times; `most` None is without an end."""

    part: Node
    least: int
    most: int | None


Node = Chars | Anchor | Concat | Either | Repeat


def pattern(expression: str, encoding: Encoding = utf8, search: bool = False) -> Automaton:
    """The automaton of the texts that the expression matches as a whole, or with `search` anywhere in them.

    Raises:
        NotRegular: the expression has something else than the above.
        TooLarge: its automaton has too many states.
    """
    tree = _Parser(expression).parse()
    anything = repeat(encoding(ALL), 0, None)
    pieces = []
    for option in _options(tree):
        parts = [*option]
        begins = ends = not search
        while parts and parts[0] == Anchor("^"):
            begins, parts = True, parts[1:]
        while parts and parts[-1] == Anchor("$"):
            ends, parts = True, parts[:-1]
        piece = concat(*(_piece(part, encoding) for part in parts))
        pieces.append(concat(*([] if begins else [anything]), piece, *([] if ends else [anything])))
    return build(either(*pieces))


def _options(node: Node) -> list[tuple[Node, ...]]:
    """The alternatives of an expression as sequences, groups with anchors in them multiplied out."""
    if isinstance(node, Either):
        return [sequence for option in node.options for sequence in _options(option)]
    if not isinstance(node, Concat):
        return [(node,)]
    found: list[tuple[Node, ...]] = [()]
    for part in node.parts:
        options = _options(part) if _has_anchor(part) and isinstance(part, Either | Concat) else [(part,)]
        found = [(*before, *option) for before in found for option in options]
    return found


def _has_anchor(node: Node) -> bool:
    match node:
        case Anchor():
            return True
        case Concat(parts):
            return any(map(_has_anchor, parts))
        case Either(options):
            return any(map(_has_anchor, options))
        case Repeat(part):
            return _has_anchor(part)
    return False


def _piece(node: Node, encoding: Encoding) -> Piece:
    match node:
        case Chars(ranges):
            return encoding(ranges)
        case Concat(parts):
            return concat(*(_piece(part, encoding) for part in parts))
        case Either(options):
            return either(*(_piece(option, encoding) for option in options))
        case Repeat(part, least, most):
            return repeat(_piece(part, encoding), least, most)
        case Anchor(sign):
            raise NotRegular(f"{sign} in the middle")


class _Parser:
    def __init__(self, text: str) -> None:
        self.text, self.place = text, 0

    def parse(self) -> Node:
        node = self._alternatives()
        if self.place < len(self.text):
            raise NotRegular(f"a ) without its ( at character {self.place}")
        return node

    def _alternatives(self) -> Node:
        options = [self._sequence()]
        while self._take("|"):
            options.append(self._sequence())
        return options[0] if len(options) == 1 else Either(tuple(options))

    def _sequence(self) -> Node:
        parts: list[Node] = []
        while self.place < len(self.text) and self.text[self.place] not in "|)":
            parts.append(self._quantified(self._atom()))
        return parts[0] if len(parts) == 1 else Concat(tuple(parts))

    def _quantified(self, node: Node) -> Node:
        bounds = self._quantifier()
        if bounds is None:
            return node
        if isinstance(node, Anchor):
            raise NotRegular(f"a repeated {node.sign}")
        least, most = bounds
        if (most is not None and most < least) or max(least, most or 0) > MAX_REPEAT:
            raise NotRegular(f"the repetition {{{least},{most}}}")
        if self._take("+"):
            raise NotRegular("a possessive quantifier")
        # Lazy: the language is the same.
        self._take("?")
        if self.place < len(self.text) and (self.text[self.place] in "*+?" or self._is_quantifier()):
            raise NotRegular(f"a repeated quantifier at character {self.place}")
        return Repeat(node, least, most)

    def _quantifier(self) -> tuple[int, int | None] | None:
        for sign, bounds in (("*", (0, None)), ("+", (1, None)), ("?", (0, 1))):
            if self._take(sign):
                return bounds
        if match := self._is_quantifier():
            self.place = match.end()
            if match[1] is None:
                raise NotRegular(f"{match[0]}, which dialects read differently: write {{0{match[0][1:]}")
            least = int(match[1])
            return least, int(match[3]) if match[3] else (None if match[2] else least)
        return None

    def _is_quantifier(self) -> re.Match[str] | None:
        return _QUANTIFIER.match(self.text, self.place)

    def _atom(self) -> Node:
        start, char = self.place, self.text[self.place]
        self.place += 1
        if char == "(":
            self._group_kind()
            node = self._alternatives()
            if not self._take(")"):
                raise NotRegular(f"a ( without its ) at character {start}")
            # Anchors in a group of its own level are found through it; see `_options`.
            return node
        if char == "[":
            return Chars(self._set())
        if char == ".":
            return Chars(_ANY)
        if char in "^$":
            return Anchor(char)
        if char in "*+?":
            raise NotRegular(f"{char} with nothing to repeat at character {start}")
        if char == "\\":
            return Chars(self._escape())
        return Chars(characters.of(char))

    def _group_kind(self) -> None:
        if not self.text.startswith("?", self.place):
            return
        for start, name in _UNSUPPORTED.items():
            if self.text.startswith(start, self.place):
                raise NotRegular(name)
        if match := re.compile(r"\?(:|P?<[A-Za-z_]\w*>)").match(self.text, self.place):
            self.place = match.end()
            return
        raise NotRegular(f"a flag or an unknown group at character {self.place}")

    def _escape(self, in_set: bool = False, possible: bool = False) -> Characters:
        """The characters that the escape surely means, or all that are `possible` in any dialect."""
        if self.place >= len(self.text):
            raise NotRegular("a \\ at the end")
        char = self.text[self.place]
        self.place += 1
        if char in _ASCII:
            return characters.unicode_class(char) if possible else _ASCII[char]
        if (lower := char.lower()) in _ASCII:
            return without(ALL, _ASCII[lower] if possible else characters.unicode_class(lower))
        if char in _HEX:
            digits = self.text[self.place : self.place + _HEX[char]]
            if not re.fullmatch(rf"[0-9a-fA-F]{{{_HEX[char]}}}", digits) or int(digits, 16) > 0x10FFFF:
                self._refuse(char)
            self.place += _HEX[char]
            return characters.of(chr(int(digits, 16)))
        if char in _CONTROL and not (char == "0" and self.text[self.place : self.place + 1].isdigit()):
            return characters.of(_CONTROL[char])
        if in_set and char == "b":
            return characters.of("\b")
        if char.isalnum():
            self._refuse(char)
        return characters.of(char)

    def _refuse(self, char: str) -> NoReturn:
        if char.isdigit():
            raise NotRegular("a back-reference")
        raise NotRegular(
            {"b": "a word boundary", "B": "a word boundary", "p": "\\p{...}"}.get(char, f"\\{char}")
        )

    def _set(self) -> Characters:
        start = self.place
        # What a negated set leaves out is all that any dialect takes it for.
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        if self.text.startswith("]", self.place):
            raise NotRegular("a ] as the first of a set, which dialects read differently: write \\]")
        while not self._take("]"):
            low = self._set_item(start, negated)
            if self.text.startswith("-", self.place) and not self.text.startswith("-]", self.place):
                self.place += 1
                high = self._set_item(start, negated)
                if any(len(r) != 1 or r[0][0] != r[0][1] for r in (low, high)) or low[0][0] > high[0][0]:
                    raise NotRegular("a range in a set that does not ascend between two characters")
                low = ((low[0][0], high[0][0]),)
            ranges += low
        return without(ALL, normal(ranges)) if negated else normal(ranges)

    def _set_item(self, start: int, possible: bool) -> Characters:
        if self.place >= len(self.text):
            raise NotRegular(f"a [ without its ] at character {start - 1}")
        if self.text.startswith(("[:", "[."), self.place):
            raise NotRegular("a POSIX class such as [:alpha:]")
        char = self.text[self.place]
        self.place += 1
        return self._escape(in_set=True, possible=possible) if char == "\\" else characters.of(char)

    def _take(self, sign: str) -> bool:
        taken = self.text.startswith(sign, self.place)
        self.place += len(sign) if taken else 0
        return taken
