"""The automaton of all canonical documents of a schema: the bytes that `json.dumps` writes, with a space behind a comma
or a colon or without, as models have learned either."""

from __future__ import annotations

from collections import defaultdict

from batchrun.structured.automaton import (
    MAX_STATES,
    Automaton,
    Nfa,
    Piece,
    TooLarge,
    build,
    either,
    embed,
    literal,
)
from batchrun.structured.decimals import integers, numbers
from batchrun.structured.facts import canonical, refusal
from batchrun.structured.nodes import Array, Integer, Literals, Node, Number, Object, String, Union
from batchrun.structured.strings import string

COMMA, COLON = (either(literal(sign), literal(sign + b" ")) for sign in (b",", b":"))


def document(node: Node, max_states: int = MAX_STATES) -> Automaton:
    """The automaton of the node's documents.

    Raises:
        JobError: it has too many states, or accepts nothing; names what is large in it.
    """
    writer = _Writer()
    try:
        automaton = build(writer.value(node), max_states)
    except TooLarge:
        raise refusal(
            "the automaton has too many states",
            writer.largest(),
            "use smaller maxLength, maxItems or repetitions",
        ) from None
    if automaton.is_empty:
        raise refusal("no value can be valid", "", "look for patterns or bounds that exclude each other")
    return automaton


class _Writer:
    """Makes the pieces of nodes, and remembers how many nodes of the automaton each of them took."""

    def __init__(self) -> None:
        self.sizes: defaultdict[str, int] = defaultdict(int)

    def largest(self) -> str:
        """The innermost place that a fifth of all nodes are of."""
        share = max(self.sizes.values(), default=0) / 5
        return max((where for where, size in self.sizes.items() if size >= share), key=len, default="")

    def value(self, node: Node) -> Piece:
        piece = self._piece(node)

        def emit(nfa: Nfa, begin: int, end: int) -> None:
            before = len(nfa.edges)
            try:
                piece(nfa, begin, end)
            finally:
                self.sizes[node.where] += len(nfa.edges) - before

        return emit

    def _piece(self, node: Node) -> Piece:
        match node:
            case Literals(values=values):
                return either(*(literal(canonical(value).encode()) for value in values))
            case Integer(low=low, high=high, multiple=multiple):
                return embed(integers(low, high, multiple))
            case Number(low=lower, high=upper):
                return embed(numbers(lower, upper))
            case String():
                return self._string(node)
            case Array():
                return self._array(node)
            case Object():
                return self._object(node)
            case Union(options=options):
                return either(*map(self.value, options))

    def _string(self, node: String) -> Piece:
        try:
            return string(node)
        except TooLarge:
            raise refusal(
                "the automaton of this string has too many states",
                node.where,
                "use a smaller maxLength or pattern",
            ) from None

    def _array(self, node: Array) -> Piece:
        prefix = [self.value(one) for one in node.prefix]
        items = None if node.items is None else self.value(node.items)
        # Without an end, the last node that is written out leads back to itself, behind one item at least.
        count = max(node.least, len(prefix), 1) if node.most is None else node.most

        def emit(nfa: Nfa, begin: int, end: int) -> None:
            here = nfa.node()
            literal(b"[")(nfa, begin, here)
            for place in range(count + 1):
                if place >= node.least:
                    literal(b"]")(nfa, here, end)
                if place == count:
                    break
                item, after = nfa.node(), nfa.node()
                (COMMA if place else literal(b""))(nfa, here, item)
                piece = prefix[place] if place < len(prefix) else items
                assert piece is not None
                piece(nfa, item, after)
                here = after
            if node.most is None and items is not None:
                item = nfa.node()
                COMMA(nfa, here, item)
                items(nfa, item, here)

        return emit

    def _object(self, node: Object) -> Piece:
        members = [
            (literal(canonical(one.name).encode()), self.value(one.value), one.required)
            for one in node.properties
        ]

        def emit(nfa: Nfa, begin: int, end: int) -> None:
            # Two ways through the members: in `first` nothing was written yet, in `later` something was.
            first, later = nfa.node(), nfa.node()
            literal(b"{")(nfa, begin, first)
            for name, value, required in members:
                member, named, colon = nfa.node(), nfa.node(), nfa.node()
                nfa.empty[first].append(member)
                COMMA(nfa, later, member)
                name(nfa, member, named)
                COLON(nfa, named, colon)
                next_first, next_later = nfa.node(), nfa.node()
                value(nfa, colon, next_later)
                if not required:
                    nfa.empty[first].append(next_first)
                    nfa.empty[later].append(next_later)
                first, later = next_first, next_later
            literal(b"}")(nfa, first, end)
            literal(b"}")(nfa, later, end)

        return emit
