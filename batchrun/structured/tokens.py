"""From an automaton over bytes to one over tokens."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchrun.errors import ModelError
from batchrun.structured.automaton import DEAD, START, Automaton
from batchrun.structured.vocabulary import Vocabulary

ENDED = 1
"""The state behind the token that ends an answer; 0 is dead here, too."""

FIRST = 2
"""The automaton's own first state. Answers begin in another one, since some tokens are less as the first of all."""

MAX_TABLE_BYTES = 1 << 30
_END = -1
# The first two functions that a walk knows.
_SAME, _NOWHERE = 0, 1


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Which tokens may follow, and where they lead.

    Tokens that no state tells apart share a class. `token_class` (tokens,) int32 is each token's, `next_state`
    (states, classes) int16 or int32 where it leads; 0 is "not allowed". State 1 is where an answer has ended, and the
    whole of it is allowed; `start` is where each begins.

    `only` (states,) int32 is the next token where no choice is left, since just one text can follow, or only the end;
    elsewhere it is -1. Followed to the end, it writes the rest in few tokens.

    Of answers behind what a model thinks: `thinking` is where those begin whose model thinks already, `answering` where
    those whose model has done so.
    """

    token_class: NDArray[np.int32]
    next_state: NDArray[np.int16 | np.int32]
    start: int
    only: NDArray[np.int32]
    thinking: int | None = None
    answering: int | None = None


def token_automaton(
    automaton: Automaton, vocabulary: Vocabulary, end_ids: Iterable[int], where: str
) -> TokenAutomaton:
    """The answers of the automaton in tokens of the vocabulary; an end token may follow where it accepts.

    A token is allowed where, behind it, some tokens lead to an end.

    Raises:
        ModelError: the vocabulary cannot write any answer, or has no token that ends one. `where` names its folder.
    """
    ends = sorted({*end_ids})
    if not ends:
        raise ModelError(
            "no token ends an answer", where, "give the model's generation_config.json an eos_token_id"
        )
    size = max(len(vocabulary.tokens), ends[-1] + 1)
    walk = _Walk(automaton)
    functions = walk.functions([*vocabulary.tokens, *[None] * (size - len(vocabulary.tokens))])
    at_start = functions
    if (first := vocabulary.first) is not None:
        # A first token that is nothing but the space that is lost changes nothing, and may be.
        at_start = walk.functions([*first, *[None] * (size - len(first))], _SAME)
    # A class is what a token does anywhere, and what it does as the first one.
    pairs = np.stack([functions, at_start], axis=1)
    pairs[ends] = _END
    kinds, token_class = np.unique(pairs, axis=0, return_inverse=True)
    # The end, and one for the very beginning.
    states = automaton.states + 2
    if kinds.shape[0] * states * (2 if states < 1 << 15 else 4) > MAX_TABLE_BYTES:
        raise ModelError(
            f"{states} states times {len(kinds)} kinds of tokens are too many",
            where,
            "use a smaller answer.schema",
        )
    # The automaton's states move up by one, behind dead and ended.
    table = np.zeros((states, len(kinds)), np.int32)
    begin = states - 1
    for kind, (function, first) in enumerate(kinds.tolist()):
        if function == _END:
            table[DEAD, kind] = ENDED
            table[2:begin, kind] = np.where(automaton.accepting[START:], ENDED, DEAD)
            table[begin, kind] = ENDED if automaton.accepting[START] else DEAD
            continue
        table[2:begin, kind] = _moved(walk.found[function][START:])
        table[begin, kind] = _moved(walk.found[first][START : START + 1])[0]
    table[ENDED] = ENDED
    _keep_living(table)
    if not table[begin].any():
        raise ModelError(
            "its vocabulary cannot write any answer of this kind",
            where,
            "use another model or another answer",
        )
    small = table.astype(np.int16) if states < 1 << 15 else table
    classes: NDArray[np.int32] = token_class.reshape(-1).astype(np.int32)
    return TokenAutomaton(classes, small, begin, _only(automaton, table, classes))


def _moved(targets: NDArray[np.int32]) -> NDArray[np.int32]:
    return np.where(targets == DEAD, DEAD, targets + 1)


def _only(
    automaton: Automaton, table: NDArray[np.int32], token_class: NDArray[np.int32]
) -> NDArray[np.int32]:
    """See `TokenAutomaton`: of the tokens that may follow, the one that leaves least to write."""
    moves = automaton.table != DEAD
    following = automaton.table[np.arange(automaton.states), moves.argmax(axis=1)]
    chained = ~automaton.accepting & (moves.sum(axis=1) == 1)
    # How many bytes are left; -1 where there is a choice.
    left = np.where(automaton.closed, 0, -1)
    left[DEAD] = -1
    while len(found := np.flatnonzero(chained & (left < 0) & (left[following] >= 0))):
        left[found] = left[following[found]] + 1
    behind = np.concatenate([[-1, -1], left[START:], left[START : START + 1]])
    _, first = np.unique(token_class, return_index=True)
    only: NDArray[np.int32] = np.full(len(table), -1, np.int32)
    for state in np.flatnonzero(behind >= 0).tolist():
        targets = table[state]
        # Behind the end less is left than nothing.
        remains = np.where(targets == DEAD, np.iinfo(np.int64).max, behind[targets])
        only[state] = first[remains.argmin()]
    return only


def _keep_living(table: NDArray[np.int32]) -> None:
    """Forbids tokens behind which no tokens lead to an end."""
    living: NDArray[np.bool_] = np.zeros(len(table), bool)
    living[ENDED] = True
    grown = True
    while grown:
        reached: NDArray[np.bool_] = np.any(living[table], axis=1)
        # It may end, but nothing may lead there.
        reached[DEAD] = False
        grown = bool((reached & ~living).any())
        living |= reached
    table[~living[table]] = DEAD


class _Walk:
    """Walks tokens through the automaton, all states at once.

    What a token does to the states is a function, and tokens are many, functions few: any text inside of a string does
    the same. Each is found once, by the function of the bytes before its last one. `found` (functions,) holds where
    each leads, (states,) int32.
    """

    def __init__(self, automaton: Automaton) -> None:
        self.automaton = automaton
        self.byte_class, representatives = automaton.classes
        # (classes, states)
        self.moves = automaton.table[:, representatives].T.copy()
        self.weights = np.random.default_rng(0).integers(1, 1 << 62, automaton.states, np.int64)
        self.found = [np.arange(automaton.states, dtype=np.int32), np.zeros(automaton.states, np.int32)]
        self.by_hash = {self._hash(one): i for i, one in enumerate(self.found)}
        self.followed: dict[int, int] = {}

    def functions(self, tokens: list[bytes | None], of_nothing: int = _NOWHERE) -> NDArray[np.int64]:
        """(tokens,) the number of what each token does; dead for None, `of_nothing` for a token of no bytes."""
        current = np.array(
            [_NOWHERE if token is None else _SAME if token else of_nothing for token in tokens], np.int64
        )
        lengths = np.array([len(token or b"") for token in tokens])
        offsets = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        data = np.frombuffer(b"".join(token or b"" for token in tokens), np.uint8)
        classes = len(self.moves)
        running = np.flatnonzero(lengths)
        place = 0
        while len(running):
            labels = self.byte_class[data[offsets[running] + place]]
            steps, inverse = np.unique(current[running] * classes + labels, return_inverse=True)
            current[running] = np.array([self._step(step) for step in steps.tolist()], np.int64)[inverse]
            place += 1
            running = running[(lengths[running] > place) & (current[running] != _NOWHERE)]
        return current

    def _step(self, step: int) -> int:
        known = self.followed.get(step)
        if known is not None:
            return known
        function, label = divmod(step, len(self.moves))
        targets = self.moves[label][self.found[function]]
        key = self._hash(targets)
        number = self.by_hash.get(key)
        if number is None or not np.array_equal(self.found[number], targets):
            number = len(self.found)
            self.found.append(targets)
            self.by_hash[key] = number
        self.followed[step] = number
        return number

    def _hash(self, targets: NDArray[np.int32]) -> int:
        return int((targets * self.weights).sum())
