"""The mask of an answer's tokens: what the tables say, for every state, in tensors of fixed shapes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from batchrun.engine.protocol import Request, TokenTables
from batchrun.engine.tokens.answer_mask import AnswerMask


def random_tables(seed: int, states: int, classes: int, tokens: int, dtype: type) -> TokenTables:
    generator = np.random.default_rng(seed)
    following = generator.integers(1, states, (states, classes))
    following[generator.random((states, classes)) < 0.6] = 0
    following[0], following[1] = 0, 1
    of = generator.integers(0, classes, tokens).astype(np.int32)
    return TokenTables(of, following.astype(dtype), states - 1, "tables")


@pytest.mark.parametrize(("states", "tokens", "vocab"), [(5, 40, 40), (70, 300, 320), (300, 129, 100)])
@pytest.mark.parametrize("dtype", [np.int16, np.int32])
def test_tokens_are_allowed_where_the_tables_lead_on(
    states: int, tokens: int, vocab: int, dtype: type
) -> None:
    tables = random_tables(states, states, 9, tokens, dtype)
    mask = AnswerMask(tables, vocab, "cpu")
    everywhere = torch.arange(states, dtype=torch.int32)
    allowed = mask.allowed(everywhere).numpy()
    shared = min(tokens, vocab)
    assert np.array_equal(allowed[:, :shared], tables.next_state[:, tables.token_class[:shared]] != 0)
    assert not allowed[:, shared:].any()
    logits = torch.randn(states, vocab)
    masked = mask.apply(logits, everywhere)
    assert torch.equal(masked == float("-inf"), ~torch.from_numpy(allowed))
    assert torch.equal(masked[torch.from_numpy(allowed)], logits[torch.from_numpy(allowed)])
    chosen = torch.randint(shared, (states,))
    expected = tables.next_state[np.arange(states), tables.token_class[chosen]]
    assert np.array_equal(mask.advance(everywhere, chosen).numpy(), expected)


def test_a_row_goes_on_behind_the_tokens_that_it_has() -> None:
    tables = random_tables(3, 20, 5, 30, np.int16)
    mask = AnswerMask(tables, 30, "cpu")
    rows = [np.array(ids, np.int32) for ids in ([], [3], [7, 7, 1])]
    expected = []
    for ids in rows:
        state = torch.tensor([tables.start], dtype=torch.int32)
        for token in ids.tolist():
            state = mask.advance(state, torch.tensor([token]))
        expected.append(state.item())
    requests = [Request(0, np.array([1], np.int32), 9)] * len(rows)
    assert mask.begin(requests, rows).tolist() == expected
    other = replace(requests[0], answer_state=int(expected[2]))
    assert mask.begin([other], rows[:1]).tolist() == [expected[2]]


def test_rows_in_pieces_are_masked_alike() -> None:
    mask = AnswerMask(random_tables(4, 40, 6, 50, np.int16), 50, "cpu")
    logits, states = torch.randn(33, 50), torch.randint(40, (33,), dtype=torch.int32)
    whole = mask.apply(logits, states)
    mask._rows = 7
    assert torch.equal(mask.apply(logits, states), whole)


def test_a_step_can_be_traced_whole() -> None:
    mask = AnswerMask(random_tables(5, 40, 6, 50, np.int16), 50, "cpu")

    def step(logits: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        return mask.advance(states, mask.apply(logits, states).argmax(-1))

    logits, states = torch.randn(4, 50), torch.full((4,), 39, dtype=torch.int32)
    traced = torch.fx.experimental.proxy_tensor.make_fx(step)(logits, states)
    assert torch.equal(traced(logits, states), step(logits, states))
