"""How requests become rectangles."""

from __future__ import annotations

from collections import deque

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from batchrun.engine.padded.batching import MAX_ROWS, PaddedBatch, by_length, take_batch
from batchrun.engine.protocol import Request


def request(id: int, length: int, max_new_tokens: int) -> Request:
    return Request(id, np.arange(1, length + 1, dtype=np.int32), max_new_tokens)


def batches(requests: list[Request], budget: int, equal_lengths: bool = False) -> list[PaddedBatch]:
    waiting, cut = deque(requests), []
    while waiting:
        cut.append(take_batch(waiting, budget, equal_lengths))
    return cut


SHAPES = st.lists(st.tuples(st.integers(1, 60), st.integers(1, 40)), min_size=1, max_size=60)


@given(shapes=SHAPES, budget=st.integers(1, 2000), equal_lengths=st.booleans())
def test_every_request_is_in_one_batch_and_only_a_lone_row_exceeds_the_budget(shapes, budget, equal_lengths):
    requests = by_length(request(i, *shape) for i, shape in enumerate(shapes))
    cut = batches(requests, budget, equal_lengths)
    assert [r for batch in cut for r in batch.requests] == requests
    for batch in cut:
        assert batch.padded_tokens <= budget or len(batch.requests) == 1
        assert not equal_lengths or len({len(r.token_ids) for r in batch.requests}) == 1


@given(shapes=SHAPES)
def test_the_longest_come_first_and_equal_rows_keep_their_order(shapes):
    ordered = by_length(request(i, length, 8) for i, (length, _) in enumerate(shapes))
    assert [(-len(r.token_ids), r.id) for r in ordered] == sorted((-len(r.token_ids), r.id) for r in ordered)


@given(shapes=SHAPES)
def test_rows_with_very_different_limits_never_share_a_batch(shapes):
    for batch in batches(by_length(request(i, *shape) for i, shape in enumerate(shapes)), 10**9):
        limits = [r.max_new_tokens for r in batch.requests]
        assert max(limits) < 2 * min(limits)


def test_a_batch_never_has_more_rows_than_pay():
    assert len(batches([request(i, 1, 1) for i in range(2 * MAX_ROWS)], 10**9)) == 2


@settings(max_examples=30)
@given(shapes=SHAPES, left=st.booleans())
def test_a_rectangle_holds_each_row_once_and_masks_everything_else(shapes, left):
    batch = PaddedBatch([request(i, *shape) for i, shape in enumerate(shapes)])
    ids, mask = batch.rectangle(left)
    for row, r in enumerate(batch.requests):
        assert ids[row][mask[row] == 1].tolist() == r.token_ids.tolist()
        assert set(ids[row].tolist()) == set(r.token_ids.tolist())
        assert mask[row, -1 if left else 0] == 1


def test_sorted_by_length_at_least_95_percent_of_the_positions_are_real_tokens():
    """A window of lognormal lengths, median 100, 8 new tokens, the CPU's default budget."""
    lengths = np.random.default_rng(0).lognormal(np.log(100), 0.8, 8192).astype(int).clip(1, 2000)
    requests = [request(i, length, 8) for i, length in enumerate(lengths)]
    real = sum(len(r.token_ids) + 8 for r in requests)

    def efficiency(ordered: list[Request], budget: int) -> float:
        return real / sum(batch.padded_tokens for batch in batches(ordered, budget))

    assert efficiency(by_length(requests), 16_384) > 0.95
    assert efficiency(by_length(requests), 500_000) > 0.9
    assert efficiency(requests, 16_384) < 0.5


def test_a_small_window_is_not_cut_into_single_rows():
    assert len(batches(by_length(request(i, 10 * i + 1, 8) for i in range(20)), 16384)) <= 2
