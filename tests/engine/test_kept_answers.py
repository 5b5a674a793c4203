"""Answers of a schema by a random model: valid wherever they end, the same in any batch and after any interruption."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import jsonschema
import numpy as np
import pytest
from tiny_models import make_tokenizer, model_folder

from batchrun.engine.choose import load_engine
from batchrun.engine.protocol import Completion, EngineSpec, Request, Sampling, TokenTables
from batchrun.errors import JobError
from batchrun.structured.answer_format import answer_format
from batchrun.structured.tokens import token_automaton
from batchrun.structured.vocabulary import read_vocabulary

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


def tables() -> TokenTables:
    wanted = answer_format(schema=SCHEMA)
    assert wanted is not None
    made = token_automaton(wanted.automaton, read_vocabulary(make_tokenizer(), "model"), [EOS], "model")
    return TokenTables(made.token_class, made.next_state, made.start, "schema")


def spec(sampling: Sampling, model: str = "llama", **options: Any) -> EngineSpec:
    folder = str(model_folder(model))
    return EngineSpec(
        "padded", folder, folder, sampling=sampling, stop_token_ids=(EOS,), options=options, answers=tables()
    )


def requests(count: int = 12) -> list[Request]:
    rng = np.random.default_rng(1)
    return [
        Request(i, rng.integers(3, 200, int(rng.integers(4, 30))).astype(np.int32), NEW, row_seed=i * 7919)
        for i in range(count)
    ]


def run(spec: EngineSpec, rows: list[Request]) -> dict[int, Completion]:
    return {c.id: c for c in load_engine(spec).generate(iter(rows))}


@pytest.mark.parametrize(
    ("model", "sampling"), [("llama", "greedy"), ("llama", "drawn"), ("llama", "warped"), ("t5", "drawn")]
)
def test_every_answer_that_ends_is_valid(model: str, sampling: str) -> None:
    tokenizer = make_tokenizer()
    done = run(spec(SAMPLINGS[sampling], model), requests())
    ended = [c for c in done.values() if c.finish_reason == "stop"]
    assert {c.finish_reason for c in done.values()} <= {"stop", "length"}
    assert sampling == "greedy" or len(ended) > 3
    for completion in ended:
        assert completion.token_ids[-1] == EOS
        text = tokenizer.decode(completion.token_ids[:-1])
        jsonschema.validate(json.loads(text), SCHEMA)


def test_an_answer_is_the_same_in_any_batch_and_behind_its_own_beginning() -> None:
    one = spec(SAMPLINGS["drawn"])
    whole = run(one, requests())
    assert {
        i: c.token_ids.tolist()
        for i, c in run(spec(SAMPLINGS["drawn"], batch_tokens=300), requests()).items()
    } == {i: c.token_ids.tolist() for i, c in whole.items()}
    begun = requests()
    for request in begun:
        answer = whole[request.id].token_ids
        request.generated = answer[: min(len(answer) - 1, 3 * (request.id % 5))]
    for i, completion in run(one, begun).items():
        assert completion.token_ids.tolist() == whole[i].token_ids.tolist()


def test_the_paged_engine_says_that_it_cannot() -> None:
    with pytest.raises(JobError, match=r"engine\.kind: the paged engine cannot keep answers"):
        load_engine(replace(spec(Sampling()), kind="paged"))
