"""Random schemas: every answer by random tokens is valid and fits its column, every valid document can be written."""

from __future__ import annotations

import json
import random

import jsonschema
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from json_schemas import (
    END,
    TOKENS,
    VOCABULARY,
    closed,
    random_answer,
    random_schema,
    random_tokens,
    random_value,
    recursive_schema,
    with_whole_numbers,
    written,
)

from batchrun.errors import JobError
from batchrun.structured.answer_format import AnswerFormat, answer_format
from batchrun.structured.tokens import ENDED, TokenAutomaton, token_automaton

SEEDS = st.integers(0, 1 << 32)


def made(r: random.Random, whole: bool = False) -> tuple[AnswerFormat, jsonschema.Draft202012Validator, dict]:
    schema = closed(random_schema(r)) if whole else random_schema(r)
    try:
        wanted = answer_format(schema=schema)
        assert wanted is not None
        assert wanted.automaton
    except JobError:  # options that overlap, or allow nothing
        assume(False)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    return wanted, jsonschema.Draft202012Validator(schema, format_checker=checker), schema


@settings(max_examples=60)
@given(SEEDS)
def test_every_answer_that_ends_is_valid_and_fits_its_column(seed: int) -> None:
    r = random.Random(seed)
    wanted, validator, _ = made(r)
    tokens = token_automaton(wanted.automaton, VOCABULARY, [END], "model")
    answers = [text.decode() for _ in range(5) if (text := random_answer(r, tokens)) is not None]
    for answer in answers:
        validator.validate(json.loads(answer))
    assert wanted.faults(answers, [True] * len(answers)) == [None] * len(answers)
    column = wanted.values(answers)
    column.validate(full=True)
    assert column.type == wanted.type
    assert wanted.values(wanted.texts(column)).equals(column)


@settings(max_examples=30)
@given(SEEDS)
def test_every_answer_of_a_recursive_schema_is_valid_and_fits_its_column(seed: int) -> None:
    r = random.Random(seed)
    schema = recursive_schema(r)
    try:
        wanted = answer_format(schema=schema)
        assert wanted is not None
        assert wanted.automaton
    except JobError:  # oneOf, options that overlap, or allow nothing
        assume(False)
    assume(wanted.levels is not None)
    validator = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    tokens = token_automaton(wanted.automaton, VOCABULARY, [END], "model")
    answers = [text.decode() for _ in range(5) if (text := random_answer(r, tokens)) is not None]
    for answer in answers:
        validator.validate(json.loads(answer))
    column = wanted.values(answers)
    column.validate(full=True)
    assert (column.type, wanted.faults(answers, [True] * len(answers))) == (
        wanted.type,
        [None] * len(answers),
    )
    assert wanted.values(wanted.texts(column)).equals(column)


@settings(max_examples=60)
@given(SEEDS)
def test_every_valid_document_can_be_written_with_any_tokens(seed: int) -> None:
    r = random.Random(seed)
    # Of what may have more than it declares, answers have what it declares.
    wanted, validator, schema = made(r, whole=True)
    tokens = token_automaton(wanted.automaton, VOCABULARY, [END], "model")
    for value in (random_value(r, schema, schema) for _ in range(8)):
        text = written(value)
        if not validator.is_valid(value):
            continue
        if not wanted.automaton.matches(text):  # 4.0 is an integer, too, and an integer is written 4
            text = written(with_whole_numbers(value))
        assert wanted.automaton.matches(text), text
        state, place = tokens.start, 0
        for token in random_tokens(r, text):
            if tokens.only[state] >= 0:
                assert rest_of(tokens, state) == text[place:]
            state = int(tokens.next_state[state, tokens.token_class[token]])
            place += len(TOKENS[token])
            assert state > ENDED, text
        assert tokens.next_state[state, tokens.token_class[END]] == ENDED
        assert tokens.only[state] in (-1, END)


def rest_of(tokens: TokenAutomaton, state: int) -> bytes:
    """The only text that may follow."""
    text = b""
    while (token := int(tokens.only[state])) != END:
        text += TOKENS[token]
        state = int(tokens.next_state[state, tokens.token_class[token]])
    assert tokens.next_state[state, tokens.token_class[END]] == ENDED
    return text


def test_what_is_left_without_a_choice_is_known_from_the_token_that_decides_it() -> None:
    wanted = answer_format(choices=["null and void", "negative", "neutral"])
    assert wanted is not None
    tokens = token_automaton(wanted.automaton, VOCABULARY, [END], "model")

    def behind(text: str) -> int:
        state = tokens.start
        for byte in text.encode():
            state = int(tokens.next_state[state, tokens.token_class[byte]])
        return state

    assert [int(tokens.only[behind(text)]) for text in ("", "n", "ne")] == [-1, -1, -1]
    assert rest_of(tokens, behind("nu")) == b"ll and void"
    assert rest_of(tokens, behind("neg")) == b"ative"
    assert tokens.only[behind("neutral")] == END
    assert tokens.only[ENDED] == -1
