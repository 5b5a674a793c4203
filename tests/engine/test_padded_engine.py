"""The padded engine: the answers of one-by-one generation, whatever the batch."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import CONFIGS, MAX_CONTEXT, make_tokenizer, model_folder

from batchrun.engine.padded.batching import PaddedBatch
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.protocol import Completion, EngineSpec, Request, Sampling
from batchrun.engine.weights.loading import load_model
from batchrun.errors import FaultCode


def spec(name: str = "llama", **changes) -> EngineSpec:
    folder = str(model_folder(name))
    options = changes.pop("options", {"batch_tokens": 400})
    return EngineSpec("padded", folder, folder, max_context=MAX_CONTEXT, options=options, **changes)


@functools.cache
def loaded(name: str) -> PaddedEngine:
    return PaddedEngine.load(spec(name))


def engine(name: str = "llama", **changes) -> PaddedEngine:
    """A fresh engine around the session's one model of that name."""
    return PaddedEngine(spec(name, **changes), loaded(name).model)


def prompts(count: int, seed: int = 0, longest: int = 40) -> list[Request]:
    rng = np.random.default_rng(seed)
    return [
        Request(
            i,
            rng.integers(3, 259, rng.integers(1, longest)).astype(np.int32),
            int(rng.integers(1, 13)),
            1000 + i,
        )
        for i in range(count)
    ]


def answers(engine: PaddedEngine, requests: Iterable[Request | None]) -> dict[int, Completion]:
    completions = list(engine.generate(iter(requests)))
    assert len({c.id for c in completions}) == len(completions)
    return {c.id: c for c in completions}


def tokens(completions: dict[int, Completion]) -> dict[int, list[int]]:
    return {id: completion.token_ids.tolist() for id, completion in completions.items()}


def one_by_one(name: str, request: Request) -> list[int]:
    """What transformers itself generates for the request alone, without any padding."""
    model = loaded(name).model
    ids = torch.from_numpy(request.token_ids.astype(np.int64))[None]
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=request.max_new_tokens, do_sample=False
    )
    return output[0, 1 if model.config.is_encoder_decoder else ids.shape[1] :].tolist()


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_answers_equal_one_by_one_generation(name):
    requests = prompts(24)
    found = tokens(answers(engine(name), requests))
    assert found == {request.id: one_by_one(name, request) for request in requests}


@settings(max_examples=12)
@given(
    seed=st.integers(0, 1000),
    count=st.integers(1, 20),
    batch_tokens=st.integers(1, 600),
    window_rows=st.integers(1, 12),
    pauses=st.sets(st.integers(0, 20)),
    sampling=st.sampled_from(
        [Sampling(), Sampling(temperature=1.5, top_k=20, repetition_penalty=1.2, seed=3)]
    ),
)
def test_every_request_completes_once_and_alike_in_any_schedule(
    seed, count, batch_tokens, window_rows, pauses, sampling
):
    requests = prompts(count, seed)
    arrivals: list[Request | None] = []
    for i, request in enumerate(requests):
        arrivals += [None, request] if i in pauses else [request]
    scheduled = engine(sampling=sampling, options={"batch_tokens": batch_tokens, "window_rows": window_rows})
    whole = engine(sampling=sampling, options={"batch_tokens": 10**6})
    assert tokens(answers(scheduled, arrivals)) == tokens(answers(whole, requests))
    assert scheduled.stats.requests == scheduled.stats.completions == count


@pytest.mark.parametrize("name", ["llama", "t5"])
def test_stats_count_the_rectangles_that_were_run(name):
    rows = [Request(i, np.full(length, 9, np.int32), 4) for i, length in enumerate([10, 8, 6])]
    padded = engine(name)
    answers(padded, rows)
    stats = padded.stats
    assert (stats.batches, stats.computed_tokens) == (1, 3 * (10 + 4))
    assert (stats.prompt_tokens, stats.output_tokens) == (24, 12)
    assert stats.padding_efficiency == pytest.approx(36 / 42)
    assert stats.busy_seconds > 0


def test_each_row_ends_at_its_own_limit_and_at_its_own_stop_token():
    requests = [Request(i, np.array([5 + i, 9, 70], np.int32), 3 + i) for i in range(12)]
    free = tokens(answers(engine(), requests))
    assert [len(free[i]) for i in range(12)] == [3 + i for i in range(12)]

    stops = (free[11][4], free[8][2])
    stopped = answers(engine(stop_token_ids=stops), requests)
    for id, answer in free.items():
        ends = [i + 1 for i, token in enumerate(answer) if token in stops]
        expected = answer[: ends[0]] if ends else answer
        assert stopped[id].token_ids.tolist() == expected
        assert stopped[id].finish_reason == ("stop" if ends else "length")
    assert {c.finish_reason for c in stopped.values()} == {"stop", "length"}


def test_a_stop_string_ends_the_answer_at_the_token_that_completes_it():
    tokenizer = make_tokenizer()
    requests = [Request(i, np.array([5 + i, 9, 70], np.int32), 12) for i in range(8)]
    texts = {id: tokenizer.decode(answer) for id, answer in tokens(answers(engine(), requests)).items()}
    stop = next(text[i : i + 2] for text in texts.values() for i in range(2, 8) if text[i : i + 2].isascii())
    stopped = answers(engine(sampling=Sampling(stop=(stop, "never this"))), requests)
    assert any(c.finish_reason == "stop" for c in stopped.values())
    for id, completion in stopped.items():
        text = tokenizer.decode(completion.token_ids)
        assert texts[id].startswith(text.rstrip("�"))
        assert (stop in text) == (completion.finish_reason == "stop") == (stop in texts[id])
        if stop in text:
            assert text.endswith(stop)
            assert stop not in tokenizer.decode(completion.token_ids[:-1])


def test_a_repetition_penalty_counts_no_padding():
    requests = prompts(10)
    sampling = Sampling(repetition_penalty=3.0)
    together = tokens(answers(engine(sampling=sampling, options={"batch_tokens": 10**6}), requests))
    alone = {r.id: tokens(answers(engine(sampling=sampling), [r]))[r.id] for r in requests}
    assert together == alone
    assert together != tokens(answers(engine(), requests))


def test_a_sampled_answer_belongs_to_the_row_and_the_seed_not_to_the_batch():
    requests = prompts(16)
    hot = Sampling(temperature=1.3, top_p=0.95, min_p=0.001, seed=11)
    together = tokens(answers(engine(sampling=hot, options={"batch_tokens": 10**6}), requests))
    assert together == tokens(answers(engine(sampling=hot, options={"batch_tokens": 1}), reversed(requests)))
    other_seed = Sampling(temperature=1.3, top_p=0.95, min_p=0.001, seed=12)
    assert together != tokens(answers(engine(sampling=other_seed), requests))


@pytest.mark.parametrize(
    "sampling",
    [Sampling(temperature=6.0), Sampling(temperature=4.0, top_k=5), Sampling(temperature=6.0, top_p=0.6)],
    ids=["temperature", "top_k", "top_p"],
)
def test_sampled_frequencies_follow_the_exact_probabilities(sampling):
    """Chi-square of 4,000 first tokens of one prompt against the softmax that the options leave."""
    draws = 4000
    with torch.inference_mode():
        logits = loaded("llama").model(torch.tensor([[40, 50, 60]])).logits[0, -1].double()
    ranked = (logits / sampling.temperature).softmax(-1).sort(descending=True)
    kept = sampling.top_k or int((ranked.values.cumsum(0) < sampling.top_p).sum()) + 1
    expected = torch.zeros_like(logits)
    expected[ranked.indices[:kept]] = ranked.values[:kept] / ranked.values[:kept].sum() * draws

    requests = [Request(i, np.array([40, 50, 60], np.int32), 1, row_seed=i * 7919) for i in range(draws)]
    drawn = answers(engine(sampling=sampling, options={"batch_tokens": 10**6}), requests)
    counts = torch.bincount(torch.tensor([c.token_ids[0] for c in drawn.values()]), minlength=len(logits))
    assert counts[expected == 0].sum() == 0

    # The usual rule: cells that expect fewer than five draws are counted as one.
    likely = expected >= 5
    observed = torch.cat([counts[likely], counts[~likely].sum()[None]]).double()
    wanted = torch.cat([expected[likely], expected[~likely].sum()[None]]).clamp(min=1e-9)
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    freedom = int(likely.sum())
    assert freedom >= 4
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def fail_above(padded: PaddedEngine, monkeypatch, tokens: int, error: Exception) -> list[int]:
    """Makes the model raise `error` for rectangles of more tokens; gives the list of all that were tried."""
    tried: list[int] = []
    generate = padded.model.generate

    def limited(ids, **kwargs):
        tried.append(ids.shape[0] * (ids.shape[1] + kwargs["generation_config"].max_new_tokens))
        if tried[-1] > tokens:
            raise error
        return generate(ids, **kwargs)

    monkeypatch.setattr(padded.model, "generate", limited)
    return tried


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu"])
def test_out_of_memory_halves_the_batches_and_is_remembered(error, monkeypatch):
    requests = [Request(i, np.full(20, 5 + i, np.int32), 5) for i in range(16)]
    expected = tokens(answers(engine(), requests))
    padded = engine(options={"batch_tokens": 400})
    tried = fail_above(padded, monkeypatch, 120, error)
    assert tokens(answers(padded, requests)) == expected
    assert tried[:3] == [400, 200, 100]
    assert max(tried[2:]) <= 100
    assert "out of memory at 400" in padded.stats.notes[0]
    del tried[:]
    assert tokens(answers(padded, requests)) == expected
    assert max(tried) <= 100


def test_a_row_that_never_fits_is_its_own_fault_alone(monkeypatch):
    requests = [Request(i, np.full(20, 5 + i, np.int32), 5) for i in range(6)]
    huge = Request(99, np.full(200, 7, np.int32), 5)
    expected = tokens(answers(engine(), requests))
    padded = engine()
    fail_above(padded, monkeypatch, 150, OUT_OF_MEMORY[1])
    found = answers(padded, [*requests, huge])
    fault = found.pop(99)
    assert (fault.finish_reason, fault.fault.code) == ("error", FaultCode.OUT_OF_MEMORY)
    assert len(fault.token_ids) == 0
    assert tokens(found) == expected


def test_any_other_error_of_the_model_is_raised(monkeypatch):
    padded = engine()
    fail_above(padded, monkeypatch, 0, RuntimeError("CUDA error: an illegal memory access was encountered"))
    with pytest.raises(RuntimeError, match="illegal memory access"):
        answers(padded, prompts(2))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0)], ids=["greedy", "sampled"])
def test_broken_logits_are_that_rows_fault(poison, sampling, monkeypatch):
    requests = [Request(i, np.array([5 + i, 9, 70], np.int32), 6) for i in range(6)]
    expected = tokens(answers(engine(sampling=sampling), requests))
    padded = engine(sampling=sampling)
    forward = padded.model.forward

    def poisoned(input_ids=None, **kwargs):
        output = forward(input_ids=input_ids, **kwargs)
        if input_ids.shape[1] == 1:  # a decode step, so that some tokens were good
            output.logits[2, -1, 17] = poison
        return output

    monkeypatch.setattr(padded.model, "forward", poisoned)
    found = answers(padded, requests)
    broken = found.pop(2)
    assert (broken.finish_reason, broken.fault.code) == ("error", FaultCode.BAD_LOGITS)
    assert tokens(found) == {id: answer for id, answer in expected.items() if id != 2}


def test_a_model_that_padding_changes_gets_batches_of_equal_lengths(monkeypatch):
    model = loaded("llama").model
    forward = model.forward

    def ignores_mask(input_ids=None, attention_mask=None, position_ids=None, **kwargs):
        return forward(input_ids=input_ids, **kwargs)

    monkeypatch.setattr(model, "forward", ignores_mask)
    padded = engine()
    assert "padding changes" in padded.stats.notes[-1]
    requests = prompts(12, longest=6)
    assert tokens(answers(padded, requests)) == {r.id: one_by_one("llama", r) for r in requests}


def test_the_models_own_generation_config_changes_nothing():
    model = loaded("llama").model
    expected = tokens(answers(engine(), prompts(4)))
    model.generation_config.update(num_beams=3, repetition_penalty=5.0, max_length=3, do_sample=True)
    assert tokens(answers(engine(), prompts(4))) == expected


def test_only_the_last_position_of_a_prompt_gets_logits(monkeypatch):
    padded = engine()
    head, widths = padded.model.lm_head.forward, []

    def watched(hidden):
        widths.append(hidden.shape[1])
        return head(hidden)

    monkeypatch.setattr(padded.model.lm_head, "forward", watched)
    answers(padded, prompts(4))
    assert set(widths) == {1}


@pytest.mark.gpu
def test_flash_attention_agrees_with_sdpa_by_logits():
    """Left-padded bf16 rows, first-token logits within what bf16 rounds."""
    requests = prompts(6)
    logits = {}
    for attention in ("flash_attention_2", "sdpa"):
        on_gpu = spec("qwen3", device="cuda")
        padded = PaddedEngine(on_gpu, load_model(on_gpu, attention))
        assert padded.stats.attention == attention
        batch = PaddedBatch(requests)
        state = padded._new_state(batch)
        output = padded._model_generate(batch, state, output_logits=True, return_dict_in_generate=True)
        logits[attention] = output.logits[0].float()
    difference = torch.linalg.norm(logits["flash_attention_2"] - logits["sdpa"], dim=-1)
    assert (difference < 0.05 * torch.linalg.norm(logits["sdpa"], dim=-1)).all()


def test_cancelled_rows_cost_no_model_run() -> None:
    padded = engine()
    asked = [Request(i, np.array([5, 6, 7 + i], np.int32), 4, cancelled=i % 2 == 1) for i in range(10)]
    found = answers(padded, asked)
    assert sorted(found) == list(range(10))
    assert {i for i, c in found.items() if c.finish_reason == "cancelled"} == {1, 3, 5, 7, 9}
    assert padded.stats.prompt_tokens == 3 * 5
