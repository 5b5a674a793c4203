"""Deterministic automata over bytes: built from nondeterministic ones, trimmed, minimized, intersected, run."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from batchrun.structured.partition import coarsest

DEAD, START = 0, 1
# Fits int16, and a mask of 152k tokens for each of them fits a GPU.
MAX_STATES = 32_000
# Of a nondeterministic automaton: a second or two.
MAX_NODES = 400_000
# Minimizing costs some 5 us per edge, and large automata (bounded strings, mostly) are minimal as they are built.
MINIMIZED_EDGES = 200_000


class TooLarge(Exception):
    """The automaton would have too many states."""


@dataclass(frozen=True, eq=False)
class Automaton:
    """A DFA. State 0 is dead (nothing leads out of it), state 1 is where every text begins.

    `table` (states, 256) int32 is the next state by byte; `accepting` (states,) bool. Every state but the dead one can
    reach an accepting one, unless the language is empty.
    """

    table: NDArray[np.int32]
    accepting: NDArray[np.bool_]

    @property
    def states(self) -> int:
        """How many there are, the dead one included."""
        return len(self.table)

    @cached_property
    def closed(self) -> NDArray[np.bool_]:
        """(states,) accepting, and nothing can follow."""
        closed: NDArray[np.bool_] = self.accepting & ~self.table.any(axis=1)
        return closed

    @cached_property
    def classes(self) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
        """Bytes that no state tells apart: (256,) the class of each byte, (classes,) a byte of each class."""
        columns = [column.tobytes() for column in self.table.T]
        first = {column: byte for byte, column in reversed([*enumerate(columns)])}
        numbers = {column: i for i, column in enumerate(first)}
        return np.array([numbers[c] for c in columns], np.int32), np.array([*first.values()], np.int32)

    @property
    def is_empty(self) -> bool:
        """Whether no text at all is accepted."""
        return not self.accepting.any()

    def run(self, texts: Sequence[bytes], start: int = START) -> NDArray[np.int32]:
        """(texts,) the state after each text."""
        states = np.full(len(texts), start, np.int32)
        order = np.argsort([-len(text) for text in texts], kind="stable")
        lengths = np.array([len(text) for text in texts], np.int64)[order]
        data = np.frombuffer(b"".join(texts[i] for i in order), np.uint8)
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]]) if len(texts) else lengths
        current = states[order]
        for place in range(int(lengths[0]) if len(texts) else 0):
            # The longest come first.
            running = int(np.searchsorted(-lengths, -place, side="left"))
            current[:running] = self.table[current[:running], data[offsets[:running] + place]]
        states[order] = current
        return states

    def matches(self, text: bytes) -> bool:
        """Whether the whole text is in the language."""
        return bool(self.accepting[self.run([text])[0]])


class Nfa:
    """Nodes with edges over byte ranges and empty ones, filled by pieces."""

    def __init__(self, max_nodes: int = MAX_NODES) -> None:
        self.edges: list[list[tuple[int, int, int]]] = []
        self.empty: list[list[int]] = []
        self.max_nodes = max_nodes

    def node(self) -> int:
        """A new node. Raises TooLarge."""
        if len(self.edges) >= self.max_nodes:
            raise TooLarge
        self.edges.append([])
        self.empty.append([])
        return len(self.edges) - 1


Piece = Callable[[Nfa, int, int], None]
"""Adds what leads from one node to another. It never adds edges into the first or out of the second."""


def literal(data: bytes) -> Piece:
    """Exactly these bytes."""

    def emit(nfa: Nfa, begin: int, end: int) -> None:
        for place, byte in enumerate(data):
            target = end if place == len(data) - 1 else nfa.node()
            nfa.edges[begin].append((byte, byte, target))
            begin = target
        if not data:
            nfa.empty[begin].append(end)

    return emit


def sequences(choices: Iterable[tuple[tuple[int, int], ...]]) -> Piece:
    """One of several sequences of byte ranges; those that end alike share nodes."""
    choices = [*choices]

    def emit(nfa: Nfa, begin: int, end: int) -> None:
        nodes: dict[tuple[tuple[int, int], ...], int] = {(): end}
        for choice in choices:
            for place in range(len(choice), 0, -1):
                rest = choice[place:]
                if rest not in nodes:
                    nodes[rest] = nfa.node()
                    nfa.edges[nodes[rest]].append((*rest[0], nodes[rest[1:]]))
            nfa.edges[begin].append((*choice[0], nodes[choice[1:]]))

    return emit


def concat(*pieces: Piece) -> Piece:
    """One after the other."""

    def emit(nfa: Nfa, begin: int, end: int) -> None:
        for place, piece in enumerate(pieces):
            target = end if place == len(pieces) - 1 else nfa.node()
            piece(nfa, begin, target)
            begin = target
        if not pieces:
            nfa.empty[begin].append(end)

    return emit


def either(*pieces: Piece) -> Piece:
    """Any of them."""

    def emit(nfa: Nfa, begin: int, end: int) -> None:
        for piece in pieces:
            piece(nfa, begin, end)

    return emit


def repeat(piece: Piece, least: int, most: int | None) -> Piece:
    """From `least` to `most` times, without an end where that is None."""

    def emit(nfa: Nfa, begin: int, end: int) -> None:
        for _ in range(least):
            target = nfa.node()
            piece(nfa, begin, target)
            begin = target
        if most is None:
            loop, back = nfa.node(), nfa.node()
            nfa.empty[begin].append(loop)
            piece(nfa, loop, back)
            nfa.empty[back].append(loop)
            nfa.empty[loop].append(end)
            return
        for _ in range(most - least):
            nfa.empty[begin].append(end)
            target = nfa.node()
            piece(nfa, begin, target)
            begin = target
        nfa.empty[begin].append(end)

    return emit


def embed(automaton: Automaton) -> Piece:
    """The language of a finished automaton."""
    moves = [_ranges(row) for row in automaton.table]

    def emit(nfa: Nfa, begin: int, end: int) -> None:
        nodes = [nfa.node() for _ in range(automaton.states)]
        nfa.empty[begin].append(nodes[START])
        for state, node in enumerate(nodes):
            nfa.edges[node].extend((low, high, nodes[target]) for low, high, target in moves[state])
            if automaton.accepting[state]:
                nfa.empty[node].append(end)

    return emit


def build(piece: Piece, max_states: int = MAX_STATES, max_nodes: int = MAX_NODES) -> Automaton:
    """The minimal DFA of the piece's language.

    Raises:
        TooLarge: it would have more states than that.
    """
    nfa = Nfa(max_nodes)
    begin, end = nfa.node(), nfa.node()
    piece(nfa, begin, end)
    return minimize(_subsets(nfa, begin, end, max_states))


def explore(
    start: Hashable, step: Callable[..., Hashable | None], accepts: Callable[..., bool], alphabet: bytes
) -> Automaton:
    """The minimal DFA whose states are what `step(state, byte)` reaches from `start`; None is the dead one.

    Raises:
        TooLarge: there are too many of them.
    """
    numbers: dict[Hashable, int] = {start: START}
    waiting: list[Hashable] = [start]
    moves: list[tuple[int, int, int]] = []
    for state in waiting:
        for byte in alphabet:
            target = step(state, byte)
            if target is None:
                continue
            if target not in numbers:
                if len(numbers) >= MAX_STATES:
                    raise TooLarge
                numbers[target] = len(numbers) + 1
                waiting.append(target)
            moves.append((numbers[state], byte, numbers[target]))
    table = np.zeros((len(numbers) + 1, 256), np.int32)
    if moves:
        sources, labels, targets = np.array(moves).T
        table[sources, labels] = targets
    return minimize(Automaton(table, np.array([False, *map(accepts, numbers)])))


def intersect(one: Automaton, other: Automaton) -> Automaton:
    """What both accept."""

    def step(pair: tuple[int, int], byte: int) -> tuple[int, int] | None:
        first, second = int(one.table[pair[0], byte]), int(other.table[pair[1], byte])
        return (first, second) if first and second else None

    # One byte stands for all that neither automaton tells apart.
    together = np.stack([one.classes[0], other.classes[0]])
    _, first, inverse = np.unique(together, axis=1, return_index=True, return_inverse=True)
    small = explore(
        (START, START),
        step,
        lambda pair: bool(one.accepting[pair[0]] and other.accepting[pair[1]]),
        bytes(first.tolist()),
    )
    return Automaton(small.table[:, first[inverse.reshape(256)]], small.accepting)


def minimize(automaton: Automaton) -> Automaton:
    """The same language with as few states as can be, or only trimmed where that would take too long."""
    automaton = _renumbered(automaton, _useful(automaton))
    _, bytes_of = automaton.classes
    sources, used = np.nonzero(automaton.table[:, bytes_of])
    if automaton.states <= 2 or len(sources) > MINIMIZED_EDGES:
        return automaton
    order = np.argsort(used, kind="stable")
    sources, used = sources[order], used[order]
    targets = automaton.table[sources, bytes_of[used]]
    blocks = coarsest(automaton.accepting, sources.tolist(), used.tolist(), targets.tolist())
    return _renumbered(automaton, np.array(blocks))


def _subsets(nfa: Nfa, begin: int, end: int, max_states: int) -> Automaton:
    """The subset construction (Rabin and Scott, 1959), on byte ranges."""
    closures: dict[int, frozenset[int]] = {}

    def closure(nodes: Iterable[int]) -> frozenset[int]:
        found: set[int] = set()
        for node in nodes:
            if node not in closures:
                reached, waiting = {node}, [node]
                while waiting:
                    new = [target for target in nfa.empty[waiting.pop()] if target not in reached]
                    reached.update(new)
                    waiting += new
                # Only nodes with edges, and the end, tell one state from another.
                closures[node] = frozenset(n for n in reached if nfa.edges[n] or n == end)
            found |= closures[node]
        return frozenset(found)

    start = closure([begin])
    numbers: dict[frozenset[int], int] = {start: START}
    closed: dict[frozenset[int], int] = {}
    waiting = [start]
    rows: list[list[tuple[int, int, int]]] = [[]]
    for nodes in waiting:
        row = []
        for low, high, targets in _split([edge for node in nodes for edge in nfa.edges[node]]):
            number = closed.get(targets)
            if number is None:
                reached = closure(targets)
                number = numbers.setdefault(reached, len(numbers) + 1)
                closed[targets] = number
                if number > len(waiting):
                    if number > max_states:
                        raise TooLarge
                    waiting.append(reached)
            row.append((low, high, number))
        rows.append(row)
    table = np.zeros((len(rows), 256), np.int32)
    for state, row in enumerate(rows):
        for low, high, number in row:
            table[state, low : high + 1] = number
    return Automaton(table, np.array([False, *(end in nodes for nodes in waiting)]))


def _split(edges: list[tuple[int, int, int]]) -> Iterable[tuple[int, int, frozenset[int]]]:
    """Edges whose ranges may overlap as disjoint ranges, each with all its targets."""
    edges.sort()
    if all(one[1] < other[0] for one, other in pairwise(edges)):
        return [(low, high, frozenset((target,))) for low, high, target in edges]
    points = sorted({edge[0] for edge in edges} | {edge[1] + 1 for edge in edges})
    pieces = []
    for low, after in pairwise(points):
        targets = frozenset(target for first, last, target in edges if first <= low <= last)
        if targets:
            pieces.append((low, after - 1, targets))
    return pieces


def _ranges(row: NDArray[np.int32]) -> list[tuple[int, int, int]]:
    """A row of the table as (first byte, last byte, target), without the dead state."""
    edges = np.flatnonzero(np.diff(row, prepend=-1))
    lasts = [*(edges[1:] - 1).tolist(), 255]
    return [
        (first, last, int(row[first]))
        for first, last in zip(edges.tolist(), lasts, strict=True)
        if row[first] != DEAD
    ]


def _useful(automaton: Automaton) -> NDArray[np.int64]:
    """(states,) numbers: 0 for states that reach no accepting one, its own for every other one and the start."""
    sources, labels = np.nonzero(automaton.table[:, automaton.classes[1]])
    targets = automaton.table[sources, automaton.classes[1][labels]]
    order = np.argsort(targets, kind="stable")
    sources = sources[order]
    first = np.searchsorted(targets[order], np.arange(automaton.states + 1))
    useful = automaton.accepting.copy()
    waiting = np.flatnonzero(useful).tolist()
    while waiting:
        state = waiting.pop()
        into = sources[first[state] : first[state + 1]]
        new = np.unique(into[~useful[into]]) if len(into) else into
        useful[new] = True
        waiting += new.tolist()
    useful[START] = True
    numbers = np.where(useful, np.arange(automaton.states), DEAD)
    return numbers


def _renumbered(automaton: Automaton, blocks: NDArray[np.int64]) -> Automaton:
    """One state per block: the dead one's first, then the start's. `blocks` (states,) is the block of each state."""
    first_blocks = np.array([blocks[DEAD], blocks[START]])
    names = [*first_blocks.tolist(), *np.setdiff1d(blocks, first_blocks).tolist()]
    numbers = np.zeros(int(blocks.max()) + 1, np.int32)
    numbers[names] = np.arange(len(names))
    members = np.zeros(len(names), np.int64)
    # The first member of each.
    members[numbers[blocks[::-1]]] = np.arange(len(blocks))[::-1]
    return Automaton(numbers[blocks[automaton.table[members]]].astype(np.int32), automaton.accepting[members])
