"""Answers that come behind what a model thinks: free tokens up to the marker that ends it, then the automaton."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from batchrun.errors import ModelError
from batchrun.structured.automaton import DEAD, Automaton
from batchrun.structured.tokens import FIRST, TokenAutomaton
from batchrun.structured.vocabulary import Vocabulary

_SPACES = [chr(i) for i in range(sys.maxunicode + 1) if chr(i).isspace()]


def begins_with_space(automaton: Automaton) -> bool:
    """Whether an answer may begin with white space."""
    return bool((automaton.run([space.encode() for space in _SPACES]) != DEAD).any())


def white_tokens(vocabulary: Vocabulary) -> NDArray[np.bool_]:
    """(tokens,) which ones are nothing but white space."""
    texts = ((token or b"").decode("utf-8", "replace") for token in vocabulary.tokens)
    return np.fromiter((text.isspace() for text in texts), bool, len(vocabulary.tokens))


def behind_thoughts(
    answers: TokenAutomaton,
    opening: Sequence[int],
    closing: Sequence[int],
    end_ids: Iterable[int],
    white: NDArray[np.bool_],
    where: str,
) -> TokenAutomaton:
    """The automaton of a model that may think before it answers; it begins where the model chooses to, `thinking` where
    it does already, `answering` where it does no more.

    While the model thinks, every token may come but those that end an answer, and the tokens of `closing` lead to the
    answer, before which one token of `white` (tokens,) may stand. The first token of `opening` begins no answer.

    Raises:
        ModelError: the model has no logits for a marker, or ends an answer with it. `where` names its folder.
    """
    size, ends = len(answers.token_class), {*end_ids}
    if max(*opening, *closing) >= size or ends & {*opening, *closing}:
        raise ModelError(
            "it cannot write the markers of its reasoning within an answer",
            where,
            "set answer.reasoning_markers, or leave answer.reasoning or the answer's form out",
        )
    flags: NDArray[np.int64] = np.zeros(size, np.int64)
    flags[: len(white)] = white[:size]
    flags[[*ends]] = 2
    # Each of the markers' tokens has a class of its own.
    numbers = {token: 3 + i for i, token in enumerate(dict.fromkeys([*opening, *closing]))}
    flags[[*numbers]] = [*numbers.values()]
    kinds, token_class = np.unique(np.stack([answers.token_class, flags], 1), axis=0, return_inverse=True)
    flag = kinds[:, 1]
    table = answers.next_state[:, kinds[:, 0]].astype(np.int32)

    def place(token: int) -> int:
        return int(np.flatnonzero(flag == numbers[token])[0])

    # Behind the automaton's states: the choice, so many tokens of `opening`, of `closing`, and what comes behind those.
    choice = len(table)
    opened, thinking = choice, choice + len(opening)
    behind = thinking + len(closing)
    rows: NDArray[np.int32] = np.zeros((behind + 1 - choice, len(kinds)), np.int32)
    table = np.concatenate([table, rows])
    table[[choice, behind]] = table[answers.start]
    if table[FIRST].any():
        table[behind, (flag == 1) & (table[answers.start] == DEAD)] = FIRST
    table[[choice, answers.start], place(opening[0])] = DEAD
    for matched, token in enumerate(opening):
        table[opened + matched, place(token)] = opened + matched + 1
    table[thinking:behind, flag != 2] = thinking
    for matched in range(len(closing)):
        for token in dict.fromkeys(closing):
            table[thinking + matched, place(token)] = thinking + _matched(
                [*closing[:matched], token], closing
            )
    only = np.concatenate([answers.only, np.full(len(table) - choice, -1, np.int32)])
    only[behind] = answers.only[answers.start]
    small = table.astype(np.int16) if len(table) < 1 << 15 else table
    classes: NDArray[np.int32] = token_class.reshape(-1).astype(np.int32)
    return replace(
        answers,
        token_class=classes,
        next_state=small,
        start=choice,
        only=only,
        thinking=thinking,
        answering=answers.start,
    )


def _matched(tokens: Sequence[int], marker: Sequence[int]) -> int:
    """How many tokens of the marker the last of `tokens` are: the search of Knuth, Morris and Pratt (1977)."""
    lengths = range(min(len(tokens), len(marker)), -1, -1)
    return next(n for n in lengths if [*tokens[len(tokens) - n :]] == [*marker[:n]])
