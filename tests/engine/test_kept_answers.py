"""Answers of a schema by a random model: valid wherever they end, the same in any batch and after any interruption."""

from __future__ import annotations

import functools
import json
import random
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
import torch
from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from json_schemas import random_schema
from tiny_models import make_tokenizer, model_folder

from batchrun.engine.choose import load_engine
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.protocol import Completion, Engine, EngineSpec, Request, Sampling, TokenTables
from batchrun.engine.tokens.answer_mask import AnswerMask
from batchrun.engine.tokens.token_values import first
from batchrun.engine.weights.loading import load_model
from batchrun.errors import FaultCode, JobError
from batchrun.structured.answer_format import AnswerFormat, answer_format
from batchrun.structured.thinking import behind_thoughts, white_tokens
from batchrun.structured.tokens import token_automaton
from batchrun.structured.vocabulary import Vocabulary, read_vocabulary

EOS = 2
NEW = 60
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 5},
        "kind": {"enum": ["é", "日本", None]},
        "size": {"type": "number", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "kind"],
}
SAMPLINGS = {
    "greedy": Sampling(),
    "drawn": Sampling(temperature=1.5, seed=4),
    "warped": Sampling(temperature=1.5, top_p=0.9, top_k=30, min_p=0.01, repetition_penalty=1.2, seed=5),
}


def tables_of(schema: dict[str, Any]) -> TokenTables:
    return tables_for(answer_format(schema=schema))


def tables_for(wanted: AnswerFormat | None) -> TokenTables:
    assert wanted is not None
    made = token_automaton(wanted.automaton, vocabulary(), [EOS], "model")
    return TokenTables(made.token_class, made.next_state, made.start, "schema", made.only)


@functools.cache
def vocabulary() -> Vocabulary:
    return read_vocabulary(make_tokenizer(), "model")


@functools.cache
def tables() -> TokenTables:
    return tables_of(SCHEMA)


def spec(sampling: Sampling, model: str = "llama", kind: str = "padded", **options: Any) -> EngineSpec:
    folder = str(model_folder(model))
    return EngineSpec(
        kind,
        folder,
        folder,
        sampling=sampling,
        stop_token_ids=(EOS,),
        max_context=256,
        options=options,
        answers=tables(),
    )


def paged(sampling: Sampling, model: str = "llama", **options: Any) -> PagedEngine:
    """With small pages, so that short rows have several."""
    wanted = spec(sampling, model, "paged", **options)
    return PagedEngine(wanted, load_model(wanted), page_size=16)


def requests(count: int = 8) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(i, rng.integers(3, 200, int(rng.integers(4, 30))).astype(np.int32), NEW, row_seed=i * 7919)
        for i in range(count)
    ]


def run(engine: Engine, rows: list[Request]) -> dict[int, Completion]:
    done = {c.id: c for c in engine.generate(iter(rows))}
    if isinstance(engine, PagedEngine):
        engine._scheduler.check()
    return done


def told(done: dict[int, Completion]) -> dict[int, tuple[list[int], str]]:
    return {i: (c.token_ids.tolist(), c.finish_reason) for i, c in sorted(done.items())}


@functools.cache
def expected(sampling: str) -> dict[int, Completion]:
    """By the padded engine."""
    return run(load_engine(spec(SAMPLINGS[sampling])), requests())


def begun(whole: dict[int, Completion]) -> list[Request]:
    """The same rows, with the beginnings of their answers."""
    rows = requests()
    for request in rows:
        answer, values = whole[request.id].token_ids, whole[request.id].values
        kept = min(len(answer) - 1, 3 * (request.id % 5))
        request.generated, request.values = answer[:kept], first(values, kept)
    return rows


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_every_answer_that_ends_is_valid(sampling: str) -> None:
    check_valid(expected(sampling), sampling != "greedy")


def test_a_model_with_a_decoder_of_its_own_keeps_to_the_schema() -> None:
    check_valid(run(load_engine(spec(SAMPLINGS["drawn"], "t5")), requests()), True)


def check_valid(done: dict[int, Completion], some: bool) -> None:
    tokenizer = make_tokenizer()
    ended = [c for c in done.values() if c.finish_reason == "stop"]
    assert {c.finish_reason for c in done.values()} <= {"stop", "length"}
    assert len(ended) > 2 * some
    for completion in ended:
        assert completion.token_ids[-1] == EOS
        jsonschema.validate(json.loads(tokenizer.decode(completion.token_ids[:-1])), SCHEMA)


def test_an_answer_of_the_padded_engine_is_the_same_in_any_batch_and_behind_its_own_beginning() -> None:
    whole = expected("drawn")
    assert told(run(load_engine(spec(SAMPLINGS["drawn"], batch_tokens=300)), requests())) == told(whole)
    assert told(run(load_engine(spec(SAMPLINGS["drawn"])), begun(whole))) == told(whole)


@pytest.mark.parametrize(("steps", "sampling"), [(1, "warped"), (3, "drawn"), (8, "warped"), (16, "greedy")])
def test_the_paged_engine_gives_the_answers_of_the_padded_one(sampling: str, steps: int) -> None:
    engine = paged(SAMPLINGS[sampling], decode_steps=steps, prefill_tokens=50)
    whole = expected(sampling)
    assert told(run(engine, requests())) == told(whole)
    assert told(run(engine, begun(whole))) == told(whole)
    few = paged(SAMPLINGS[sampling], decode_steps=steps, max_rows=5)
    assert told(run(few, requests()[::-1])) == told(whole)


@pytest.mark.parametrize("sampling", ["greedy", "warped"])
def test_answers_of_rows_that_were_preempted_are_the_same(sampling: str) -> None:
    # Hoping for short answers, it admits too many rows.
    engine = paged(SAMPLINGS[sampling], decode_steps=4, cache_tokens=96, max_rows=8)
    assert told(run(engine, requests())) == told(expected(sampling))
    assert engine.stats.gauges["preemptions"] > 0


@pytest.mark.parametrize("shared", [5, 40])
def test_rows_that_share_a_prefix_and_rows_that_come_twice_keep_to_their_own_answers(shared: int) -> None:
    rows = [
        replace(r, id=i, row_seed=i, token_ids=np.concatenate([np.full(shared, 9, np.int32), r.token_ids]))
        for i, r in enumerate([*requests(6), *requests(6)])
    ]
    drawn = SAMPLINGS["drawn"]
    engine = paged(drawn, decode_steps=5)
    assert told(run(engine, rows)) == told(run(load_engine(spec(drawn)), rows))
    assert engine.stats.shared_tokens > 0


def test_log_probabilities_are_those_of_the_model_whatever_the_schema_allows() -> None:
    sampling = replace(SAMPLINGS["warped"], logprobs=2)
    whole = run(load_engine(spec(sampling)), requests())
    found = run(paged(sampling, decode_steps=5, cache_tokens=160, max_rows=8), begun(whole))
    assert told(found) == told(whole)
    for i, one in whole.items():
        for name, column in one.values.items():
            assert len(column) == len(one.token_ids)
            np.testing.assert_allclose(found[i].values[name], column, atol=1e-4, rtol=1e-4)


@settings(max_examples=8, phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(
    seed=st.integers(0, 1 << 32),
    decode_steps=st.integers(1, 16),
    cache_tokens=st.sampled_from([160, 1600]),
    max_rows=st.sampled_from([2, 5]),
)
def test_every_answer_of_a_random_schema_that_ends_is_valid(seed: int, **options: int) -> None:
    schema = random_schema(random.Random(seed))
    try:
        own = tables_of(schema)
    except JobError:  # options that overlap, or allow nothing
        assume(False)
    engines: list[Engine] = []
    for kind in ("paged", "padded"):
        wanted = replace(spec(SAMPLINGS["drawn"], kind=kind), answers=own, options=dict(options))
        model = load_model(wanted)
        engines.append(
            PaddedEngine(wanted, model) if kind == "padded" else PagedEngine(wanted, model, page_size=16)
        )
    found, whole = (run(engine, requests(5)) for engine in engines)
    assert told(found) == told(whole)
    check = jsonschema.Draft202012Validator(
        schema, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for completion in found.values():
        if completion.finish_reason == "stop":
            check.validate(json.loads(make_tokenizer().decode(completion.token_ids[:-1])))


@pytest.mark.parametrize("kind", ["padded", "paged"])
@pytest.mark.parametrize("sampling", ["greedy", "drawn"])
def test_a_row_whose_allowed_tokens_the_model_rules_out_fails_alone(kind: str, sampling: str) -> None:
    """Logits of minus infinity, which models give to tokens that are never to be said."""
    whole = expected(sampling)
    engine = paged(SAMPLINGS[sampling]) if kind == "paged" else load_engine(spec(SAMPLINGS[sampling]))
    model: Any = engine._runner._model if isinstance(engine, PagedEngine) else engine.model  # type: ignore[attr-defined]
    head = model.lm_head.forward
    # An answer opens with a brace.
    brace = make_tokenizer().convert_tokens_to_ids("{")

    def without_braces(hidden: torch.Tensor) -> torch.Tensor:
        logits = head(hidden)
        return torch.where(torch.arange(logits.shape[-1]) == brace, float("-inf"), logits)

    model.lm_head.forward = without_braces
    found = run(engine, [*requests(3), *begun(whole)[3:5]])
    assert {found[i].fault.code for i in range(3)} == {FaultCode.BAD_LOGITS}  # type: ignore[union-attr]
    assert told({i: found[i] for i in (3, 4)}) == told({i: whole[i] for i in (3, 4)})


@pytest.mark.parametrize("kind", ["padded", "paged"])
@pytest.mark.parametrize("new", [1, 3, 60])
def test_an_answer_of_which_one_ending_is_left_is_completed_without_the_model(kind: str, new: int) -> None:
    labels = ["positive", "negative", "neutral", "mixed"]
    free = tables_for(answer_format(choices=labels))
    wanted = replace(spec(SAMPLINGS["drawn"], kind=kind, decode_steps=5), answers=free)
    rows = [replace(r, max_new_tokens=new) for r in requests()]
    engine = load_engine(wanted)
    before = engine.stats.steps
    found = run(engine, rows)
    # With log probabilities every token is the model's.
    alone = load_engine(replace(wanted, sampling=replace(wanted.sampling, logprobs=0)))
    whole = run(alone, rows)
    # Tokens are bytes here, so that both have the same.
    assert told(found) == told(whole)
    assert all(not one.values for one in found.values())
    texts = [make_tokenizer().decode(c.token_ids[:-1]) for c in found.values() if c.finish_reason == "stop"]
    assert set(texts) <= set(labels)
    assert len(texts) == (8 if new == 60 else 0)
    if new == 60:
        assert engine.stats.steps < alone.stats.steps
        if kind == "padded":
            # At most n, e, g of an answer come from the model.
            assert engine.stats.steps - before == 3
    assert engine.stats.padding_efficiency <= 1
    # Whose beginning is there already.
    halves = [
        replace(r, generated=found[r.id].token_ids[: min(r.id % 6, len(found[r.id].token_ids) - 1)])
        for r in rows
    ]
    assert told(run(engine, halves)) == told(found)


# Tokens that no text has, as markers are.
OPEN, CLOSE, TWICE = 300, 301, 302
THOUGHT = {
    "closed by a token": ((OPEN,), (CLOSE,)),
    "closed by several": ((OPEN, TWICE), (CLOSE, CLOSE, TWICE)),
}
NEW_WITH_THOUGHT = 110


@functools.cache
def thought_tables(markers: str) -> TokenTables:
    wanted, wide = answer_format(schema=SCHEMA), Vocabulary([*vocabulary().tokens, *[None] * 61])
    assert wanted is not None
    plain = token_automaton(wanted.automaton, wide, [EOS], "model")
    opening, closing = THOUGHT[markers]
    made = behind_thoughts(plain, opening, closing, [EOS], white_tokens(wide), "model")
    return TokenTables(
        made.token_class, made.next_state, made.start, markers, made.only, made.thinking, made.answering
    )


def thoughtful(kind: str, markers: str, **options: Any) -> Engine:
    """Its model opens and closes thoughts often."""
    wanted = replace(spec(SAMPLINGS["drawn"], kind=kind), answers=thought_tables(markers), options=options)
    model = load_model(wanted)
    head = model.lm_head.forward
    likelier = torch.zeros(320)
    likelier[OPEN], likelier[[CLOSE, TWICE]] = 6.0, 6.5
    model.lm_head.forward = lambda hidden: head(hidden) + likelier
    return PaddedEngine(wanted, model) if kind == "padded" else PagedEngine(wanted, model, page_size=16)


def thinkers(markers: str) -> list[Request]:
    """Rows whose model may think, does so already, or does so no more."""
    tables = thought_tables(markers)
    begins = [None, tables.thinking, tables.answering]
    return [replace(r, max_new_tokens=NEW_WITH_THOUGHT, answer_state=begins[r.id % 3]) for r in requests(12)]


def check_thoughts(done: dict[int, Completion], markers: str) -> tuple[int, int]:
    """How many answers ended behind a thought and without one, all of them valid."""
    opening, closing = ([*map(int, one)] for one in THOUGHT[markers])
    behind = plain = 0
    for i, completion in done.items():
        if completion.finish_reason != "stop":
            continue
        tokens = completion.token_ids.tolist()
        thinks = i % 3 == 1 or (i % 3 == 0 and tokens[: len(opening)] == opening)
        if thinks:
            ends = range(len(closing), len(tokens))
            end = next(n for n in ends if tokens[n - len(closing) : n] == closing)
            tokens = tokens[end:]
        behind, plain = behind + thinks, plain + (not thinks)
        text = make_tokenizer().decode(tokens[:-1])
        assert thinks or not text[0].isspace()
        jsonschema.validate(json.loads(text.lstrip()), SCHEMA)
    return behind, plain


@functools.cache
def thoughts(markers: str) -> dict[int, Completion]:
    return run(thoughtful("padded", markers), thinkers(markers))


@pytest.mark.parametrize("markers", THOUGHT)
def test_an_answer_behind_a_thought_is_valid_wherever_it_ends(markers: str) -> None:
    behind, plain = check_thoughts(thoughts(markers), markers)
    assert behind > 1
    assert plain > 1


@pytest.mark.parametrize(
    ("markers", "steps"), [("closed by several", 1), ("closed by a token", 3), ("closed by several", 16)]
)
def test_both_engines_think_alike_in_any_batch_when_preempted_and_behind_their_own_beginnings(
    markers: str, steps: int
) -> None:
    whole = thoughts(markers)
    few = thoughtful("padded", markers, batch_tokens=400)
    tight = thoughtful("paged", markers, decode_steps=steps, cache_tokens=144, max_rows=8)
    for engine in (few, tight):
        assert told(run(engine, thinkers(markers)[::-1])) == told(whole)
        halves = []
        for row in thinkers(markers):
            answer = whole[row.id].token_ids
            halves.append(replace(row, generated=answer[: min(len(answer) - 1, 7 * (row.id % 9))]))
        assert told(run(engine, halves)) == told(whole)
    assert tight.stats.gauges["preemptions"] > 0


def test_an_answer_ends_at_a_stop_string_as_well() -> None:
    sampling = replace(SAMPLINGS["drawn"], stop=("e",))
    whole = run(load_engine(spec(sampling)), requests())
    assert told(run(paged(sampling, decode_steps=5), requests())) == told(whole)
    assert all(c.token_ids[-1] != EOS for c in whole.values() if c.finish_reason == "stop")


@pytest.mark.parametrize("sampling", ["greedy", "drawn"])
def test_a_job_without_a_schema_does_nothing_for_one(sampling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("begin", "apply", "advance"):
        monkeypatch.delattr(AnswerMask, name)
    wanted = replace(spec(SAMPLINGS[sampling], kind="paged"), answers=None)
    engine = PagedEngine(wanted, load_model(wanted), page_size=16)
    assert len(run(engine, requests())) == 8
    assert engine._runner._states is None
