"""How long answers will be, as far as those that are there tell."""

from __future__ import annotations

import numpy as np

from batchrun.engine.protocol import Request
from batchrun.worker.answer_lengths import FEW, AnswerLengths
from batchrun.worker.generation import AttemptCounters
from batchrun.worker.handover import PROMPT_TOKENS, Handover

PROMPTS = np.array([10, 40, 100])
LIMITS = np.array([256, 256, 64])


def test_until_a_few_answers_are_there_the_limits_count():
    lengths = AnswerLengths()
    for _ in range(FEW - 1):
        lengths.add(10, 5)
    assert lengths.expected(PROMPTS, LIMITS).tolist() == [256, 256, 64]


def test_answers_that_grow_with_their_prompts_are_foreseen_within_their_limits():
    lengths = AnswerLengths()
    for prompt in range(12, 240, 3):
        lengths.add(prompt, 0.5 * prompt + 7)
    assert np.allclose(lengths.expected(PROMPTS, LIMITS), [12, 27, 57])
    assert lengths.expected(np.array([1000]), np.array([64])).tolist() == [64]


def test_prompts_of_one_length_promise_the_mean():
    lengths = AnswerLengths()
    for i in range(20):
        lengths.add(30, 10 + 2 * (i % 2))
    assert np.allclose(lengths.expected(PROMPTS, LIMITS), 11)


def test_what_an_attempt_has_left_is_told_by_the_answers_that_are_there():
    counters = AttemptCounters(run="run", partition=0)
    handover = Handover(np.ones(40, bool), counters, None, AnswerLengths())
    for row in range(40):
        assert handover.reach(row)
        handover.sent(row, [Request(row, np.ones(8 + row % 4, np.int32), 1000)], 0)
    for row in range(20):
        handover.ended(row, 2 * (8 + row % 4))
    handover.serve(lambda rows, work, most: None)
    left = sum((2 + 1 / PROMPT_TOKENS) * (8 + row % 4) for row in range(20, 40))
    assert np.isclose(counters.work_left, left)
    assert np.isclose(counters.work_done, left)


def test_tokens_that_an_earlier_attempt_left_are_no_work():
    counters = AttemptCounters(run="run", partition=0)
    handover = Handover(np.ones(2, bool), counters, None, AnswerLengths())
    for row in range(2):
        request = Request(row, np.ones(8, np.int32), 100, generated=np.ones(30, np.int32))
        handover.reach(row)
        handover.sent(row, [request], 0)
    handover.ended(0, 50)
    handover.serve(lambda rows, work, most: None)
    assert counters.work_done == 20 + 8 / PROMPT_TOKENS
    assert counters.work_left == 70 + 8 / PROMPT_TOKENS
