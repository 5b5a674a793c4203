"""Answers of a schema from the paged engine on a GPU: captured steps, compiled sampling, preempted rows."""

from __future__ import annotations

import json

import jsonschema
import numpy as np
import pytest
import torch
import transformers
from json_schemas import END, VOCABULARY

pytest.importorskip("triton")

from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.device import sampler_kernels as kernels
from batchrun.engine.paged.device.sampler import INVALID_TOKEN
from batchrun.engine.protocol import EngineSpec, Request, Sampling, TokenTables
from batchrun.engine.tokens.answer_mask import AnswerMask
from batchrun.structured.answer_format import answer_format
from batchrun.structured.thinking import behind_thoughts, white_tokens
from batchrun.structured.tokens import token_automaton
from batchrun.structured.vocabulary import Vocabulary

pytestmark = pytest.mark.gpu
ROWS, NEW = 300, 150
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 9},
        "kind": {"enum": ["é", "日本", None]},
        "size": {"type": "number", "minimum": 0, "maximum": 9},
        "tags": {"type": "array", "items": {"type": "integer", "maximum": 99}, "maxItems": 3},
        "day": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
    },
    "required": ["name", "kind", "tags", "day"],
}


def _tables() -> TokenTables:
    wanted = answer_format(schema=SCHEMA)
    assert wanted is not None
    made = token_automaton(wanted.automaton, VOCABULARY, [END], "model")
    return TokenTables(made.token_class, made.next_state, made.start, "schema", made.only)


@pytest.mark.parametrize(
    ("sampling", "compiled"),
    [(Sampling(), False), (Sampling(temperature=1.5, seed=1), True)],
    ids=["greedy", "drawn, compiled"],
)
def test_every_answer_that_ends_is_valid(sampling: Sampling, compiled: bool) -> None:
    config = transformers.Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, initializer_range=0.05,
    )  # fmt: skip
    with torch.device("cuda"), torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    options: dict[str, object] = {"compile": compiled, "max_rows": 200, "cache_tokens": 60_000}
    spec = EngineSpec(
        "paged", "", "", device="cuda", sampling=sampling, options=options, stop_token_ids=(END,), answers=_tables(),
        max_context=1024,
    )  # fmt: skip
    engine = PagedEngine(spec, model)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 2000, int(rng.integers(5, 300))).astype(np.int32) for _ in range(ROWS)]
    done = list(engine.generate(Request(i, prompt, NEW, i) for i, prompt in enumerate(prompts)))
    engine._scheduler.check()
    assert len(done) == ROWS
    ended = [c for c in done if c.finish_reason == "stop"]
    validator = jsonschema.Draft202012Validator(
        SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    for completion in ended:
        validator.validate(json.loads(VOCABULARY.text(completion.token_ids[:-1].tolist())))
    print(f"{len(ended)} of {ROWS} answers ended, {engine.stats.gauges['preemptions']:.0f} preemptions")
    assert len(ended) > ROWS // 2 or sampling.temperature == 0
    assert {c.finish_reason for c in done} <= {"stop", "length"}


@pytest.mark.parametrize(
    ("sampling", "compiled"),
    [(Sampling(temperature=0.9, seed=2), False), (Sampling(temperature=0.9, seed=1), True)],
    ids=["drawn", "drawn, compiled"],
)
def test_an_answer_behind_a_thought_is_valid_wherever_it_ends(sampling: Sampling, compiled: bool) -> None:
    opening, closing = 2000, (2001, 2001, 2002)
    wanted, wide = answer_format(schema=SCHEMA), Vocabulary([*VOCABULARY.tokens, *[None] * 1751])
    assert wanted is not None
    assert END < opening < len(wide.tokens)
    plain = token_automaton(wanted.automaton, wide, [END], "model")
    made = behind_thoughts(plain, [opening], closing, [END], white_tokens(wide), "model")
    tables = TokenTables(
        made.token_class, made.next_state, made.start, "thoughts", made.only, made.thinking, made.answering
    )
    config = transformers.Qwen3Config(
        vocab_size=2048, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=4096, initializer_range=0.05,
    )  # fmt: skip
    with torch.device("cuda"), torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        # Opens and closes thoughts often, whatever came before: a number that is the same behind every token lifts the
        # logits of those that do.
        model.model.embed_tokens.weight[:, 0] = 10.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[[opening, *closing], 0] = 1.3
    options: dict[str, object] = {"compile": compiled, "max_rows": 200, "cache_tokens": 60_000}
    spec = EngineSpec(
        "paged", "", "", device="cuda", sampling=sampling, options=options, stop_token_ids=(END,), answers=tables,
        max_context=1024,
    )  # fmt: skip
    engine = PagedEngine(spec, model)
    rng = np.random.default_rng(0)
    begins = [None, tables.thinking, tables.answering]
    requests = [
        Request(
            i,
            rng.integers(0, 2000, int(rng.integers(5, 300))).astype(np.int32),
            NEW,
            i,
            answer_state=begins[i % 3],
        )
        for i in range(ROWS)
    ]
    done = list(engine.generate(iter(requests)))
    engine._scheduler.check()
    validator = jsonschema.Draft202012Validator(
        SCHEMA, format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER
    )
    ended = {True: 0, False: 0}
    for completion in done:
        if completion.finish_reason != "stop":
            continue
        tokens = completion.token_ids.tolist()
        thinks = completion.id % 3 == 1 or (completion.id % 3 == 0 and tokens[0] == opening)
        if thinks:
            tokens = tokens[next(n for n in range(3, len(tokens)) if tuple(tokens[n - 3 : n]) == closing) :]
        validator.validate(json.loads(wide.text(tokens[:-1]).decode().strip()))
        ended[thinks] += 1
    print(f"of {ROWS} answers {ended[True]} ended behind a thought, {ended[False]} without one")
    assert min(ended.values()) > ROWS // 20


@pytest.mark.parametrize("rows", [1, 700])
def test_the_kernel_takes_the_token_that_plain_masking_takes(rows: int) -> None:
    mask = AnswerMask(_tables(), 151936, "cuda")
    logits = torch.randn(rows, 151936, device="cuda").bfloat16()
    states = torch.randint(0, len(mask.mask_of), (rows,), device="cuda", dtype=torch.int32)
    found = kernels.likeliest_allowed(logits, states, mask, INVALID_TOKEN)
    best = mask.apply(logits, states).amax(dim=-1)
    assert torch.equal(logits.gather(1, found[:, None])[:, 0], best)
    assert mask.allowed(states).gather(1, found[:, None]).all()
