"""Answers behind what a model thinks: free up to the closing marker, kept to their form behind it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.errors import ModelError
from batchrun.structured.answer_format import AnswerFormat, answer_format
from batchrun.structured.thinking import begins_with_space, behind_thoughts, white_tokens
from batchrun.structured.tokens import ENDED, TokenAutomaton, token_automaton
from batchrun.structured.vocabulary import Vocabulary

TEXTS = ["a", "b", "ab", " ", "\n\n", "ba", "<", "x"]
# Special ones, which no answer has.
OPEN, AND_ON, CLOSE, TWICE, END = range(len(TEXTS), len(TEXTS) + 5)
VOCABULARY = Vocabulary([*(text.encode() for text in TEXTS), None, None, None, None, None])
MARKERS = {
    "of a token": ((OPEN,), (CLOSE,)),
    "of several": ((OPEN, AND_ON), (CLOSE, CLOSE, TWICE, CLOSE)),
    "of text, too": ((OPEN, 0), (CLOSE, 0, CLOSE, 1)),
}


def made(wanted: AnswerFormat | None, opening: tuple[int, ...], closing: tuple[int, ...]) -> TokenAutomaton:
    assert wanted is not None
    plain = token_automaton(wanted.automaton, VOCABULARY, [END], "model")
    white = white_tokens(VOCABULARY) & (not begins_with_space(wanted.automaton))
    return behind_thoughts(plain, opening, closing, [END], white, "model")


def walked(automaton: TokenAutomaton, tokens: list[int], start: int) -> int:
    state = start
    for token in tokens:
        state = int(automaton.next_state[state, automaton.token_class[token]])
        if not state:
            break
    return state


def is_answer(wanted: AnswerFormat, tokens: list[int], spaced: bool) -> bool:
    """Whether the tokens are one whole answer, behind one of white space where that may be."""
    if not tokens or tokens[-1] != END or max(tokens[:-1], default=0) >= len(TEXTS):
        return False
    text = "".join(TEXTS[token] for token in tokens[:-1])
    if wanted.automaton.matches(text.encode()):
        return True
    first = TEXTS[tokens[0]] if len(tokens) > 1 else ""
    rest = text[len(first) :]
    return spaced and first.isspace() and wanted.automaton.matches(rest.encode())


@pytest.mark.parametrize("markers", MARKERS)
@pytest.mark.parametrize("regex", ["(ab|b)a?", "[ab ]{0,3}", "a+"])
@settings(max_examples=100)
@given(data=st.data())
def test_the_form_holds_behind_the_closing_marker_and_nowhere_before(markers, regex, data) -> None:
    wanted = answer_format(regex=regex)
    assert wanted is not None
    opening, closing = MARKERS[markers]
    automaton = made(wanted, opening, closing)
    some = st.sampled_from([*range(len(TEXTS)), OPEN, AND_ON, CLOSE, CLOSE, TWICE])
    thought = data.draw(st.lists(some, max_size=8))
    answer = [*data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 4, 5]), max_size=3)), END]
    ended = next(
        (n for n in range(len(closing), len(thought) + 1) if tuple(thought[n - len(closing) : n]) == closing),
        None,
    )
    spaced = not begins_with_space(wanted.automaton)
    assert automaton.thinking is not None
    assert automaton.answering is not None
    if ended is None:
        assert walked(automaton, thought, automaton.thinking) != 0, "all may come while the model thinks"
        assert walked(automaton, [*thought, END], automaton.thinking) == 0, "but an end"
        thought, ended = [*thought, *closing], len(thought) + len(closing)
        # It may have been begun by the thought's last tokens.
        ended = next(
            n for n in range(len(closing), ended + 1) if tuple(thought[n - len(closing) : n]) == closing
        )
    whole = [*thought[:ended], *answer]
    valid = is_answer(wanted, answer, spaced)
    assert (walked(automaton, whole, automaton.thinking) == ENDED) == valid
    assert (walked(automaton, [*opening, *whole], automaton.start) == ENDED) == valid
    plain = is_answer(wanted, answer, spaced=False)
    for start in (automaton.start, automaton.answering):
        assert (walked(automaton, answer, start) == ENDED) == plain, "at once, without a thought"
    assert walked(automaton, [*opening, *whole], automaton.answering) == 0


def test_where_one_answer_is_left_it_follows_the_marker_without_the_model() -> None:
    automaton = made(answer_format(choices=["ab"]), (OPEN,), (CLOSE,))
    assert automaton.only[automaton.start] == -1
    assert automaton.thinking is not None
    assert automaton.only[automaton.thinking] == -1
    behind = walked(automaton, [CLOSE], automaton.thinking)
    rest = []
    while (token := int(automaton.only[behind])) >= 0:
        rest.append(token)
        behind = walked(automaton, [token], behind)
    assert (rest, behind) == ([2, END], ENDED)


@pytest.mark.parametrize(("opening", "closing"), [((OPEN,), (END,)), ((OPEN,), (99,)), ((50,), (CLOSE,))])
def test_markers_that_the_model_cannot_write_are_refused(opening, closing) -> None:
    with pytest.raises(ModelError, match="cannot write the markers of its reasoning"):
        made(answer_format(choices=["ab"]), opening, closing)


def test_tokens_of_white_space_are_known() -> None:
    vocabulary = Vocabulary([b" ", b"\n\t", b"", None, b"a ", "\u3000".encode(), b"\xe3"])
    assert np.flatnonzero(white_tokens(vocabulary)).tolist() == [0, 1, 5]
