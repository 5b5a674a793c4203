"""Scores are the model's own log probabilities of the tokens that were asked for, whatever batch computed them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import model_folder

from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.processes.wire import CompletionPack, RequestPack
from batchrun.engine.protocol import Completion, Engine, EngineSpec, Request, Scored
from batchrun.engine.weights.loading import load_model
from batchrun.errors import FaultCode

PREFIX = np.random.default_rng(0).integers(3, 200, 90).astype(np.int32)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def _spec(kind: str, model: str, **options: Any) -> EngineSpec:
    folder = str(model_folder(model))
    return EngineSpec(kind, folder, folder, max_context=256, options=options)


def _engine(kind: str, model: str = "llama", **options: Any) -> PaddedEngine | PagedEngine:
    spec = _spec(kind, model, **options)
    if kind == "padded":
        return PaddedEngine.load(spec)
    return PagedEngine(spec, load_model(spec), page_size=16)


def _requests(rows: int = 14) -> list[Request]:
    """Continuations behind prompts of which most begin alike, and labels behind one place or two."""
    rng = np.random.default_rng(1)
    requests = []
    for i in range(rows):
        own = rng.integers(3, 200, int(rng.integers(1, 25))).astype(np.int32)
        tokens = np.concatenate([PREFIX[: i * 7], own]).astype(np.int32)
        count = int(rng.integers(1, len(tokens) + 1))
        back = np.arange(count - 1, -1, -1, dtype=np.int32)
        if i % 3 == 2:
            back = np.sort(rng.integers(0, min(3, len(tokens)), 5))[::-1].astype(np.int32)
        wanted = rng.integers(0, 320, len(back)).astype(np.int32)
        requests.append(Request(i, tokens, 1, i, scored=Scored(wanted, back)))
    return requests


@functools.cache
def _plain(model: str) -> Any:
    return load_model(_spec("padded", model))


def _exact(model: str, request: Request) -> np.ndarray:
    scored = request.scored
    assert scored is not None
    with torch.no_grad():
        ids = torch.from_numpy(request.token_ids.astype(np.int64))[None]
        logprobs = _plain(model)(input_ids=ids).logits[0].float().log_softmax(-1).numpy()
    return logprobs[len(request.token_ids) - 1 - scored.back, scored.token_ids]


def _run(engine: Engine, requests: list[Request]) -> dict[int, Completion]:
    return {one.id: one for one in engine.generate(iter(requests))}


def _check(found: dict[int, Completion], requests: list[Request], model: str = "llama") -> None:
    assert found.keys() == {request.id for request in requests}
    for request in requests:
        one = found[request.id]
        assert request.scored is not None
        assert (one.finish_reason, one.fault) == ("stop", None)
        assert one.token_ids.tolist() == request.scored.token_ids.tolist()
        np.testing.assert_allclose(one.values["logprobs"], _exact(model, request), **CLOSE)


@pytest.mark.parametrize("model", ["llama", "gemma2", "opt", "mamba"])
def test_both_engines_give_what_a_plain_forward_pass_gives(model: str) -> None:
    for kind in ("padded", "paged") if model != "mamba" else ("padded",):
        engine = _engine(kind, model)
        head = engine._scoring if isinstance(engine, PaddedEngine) else engine._runner._scoring
        # The whole vocabulary of only a few positions at a time.
        head._rows = 3
        _check(_run(engine, _requests()), _requests(), model)


@pytest.mark.parametrize(
    "options",
    [
        {"prefill_tokens": 16},
        {"prefill_tokens": 48, "max_rows": 3},
        {"cache_tokens": 256},
        {"decode_steps": 1},
    ],
    ids=str,
)
def test_prompts_in_pieces_shared_pages_and_small_pools_change_no_score(options: dict[str, int]) -> None:
    engine = _engine("paged", **options)
    for _ in range(2):  # the second time the pool holds every prompt
        _check(_run(engine, _requests()), _requests())
        engine._scheduler.check()
    assert engine.stats.shared_tokens > 0
    assert engine.stats.output_tokens == 0


def test_rows_that_share_a_prompt_compute_it_once() -> None:
    labels = [np.array(label, np.int32) for label in ([7], [9, 11, 5], [9, 12])]
    prompt = PREFIX[:80]
    requests = [
        Request(
            i,
            np.concatenate([prompt, label[:-1]]).astype(np.int32),
            1,
            scored=Scored(label, np.arange(len(label) - 1, -1, -1, dtype=np.int32)),
        )
        for i, label in enumerate(labels)
    ]
    engine = _engine("paged")
    _check(_run(engine, requests), requests)
    assert engine.stats.shared_tokens >= 2 * 64


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_scores_and_answers_go_through_one_engine_side_by_side(kind: str) -> None:
    plain = [Request(100 + i, PREFIX[: 5 + i], new, i) for i, new in enumerate((1, 6, 1, 9))]
    engine = _engine(kind, prefill_tokens=32)
    alone = _run(engine, plain)
    mixed = _run(engine, [*_requests(), *plain])
    for request in plain:
        assert mixed[request.id].token_ids.tolist() == alone[request.id].token_ids.tolist()
    _check({i: one for i, one in mixed.items() if i < 100}, _requests())


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_a_row_without_finite_logits_is_its_own_fault(kind: str) -> None:
    engine = _engine(kind, "qwen3")
    model = engine.model if isinstance(engine, PaddedEngine) else engine._runner._model
    with torch.no_grad():
        model.get_input_embeddings().weight[5] = float("nan")
    requests = [
        Request(i, np.array([4, token, 6], np.int32), 1, scored=Scored(PREFIX[:1], np.zeros(1, np.int32)))
        for i, token in enumerate((5, 7))
    ]
    found = _run(engine, requests)
    assert found[0].fault is not None
    assert found[0].fault.code == FaultCode.BAD_LOGITS
    _check({1: found[1]}, requests[1:], "qwen3")


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_a_cancelled_row_ends_without_a_score_and_the_others_keep_theirs(kind: str) -> None:
    requests = _requests()
    requests[3].cancelled = requests[8].cancelled = True
    found = _run(_engine(kind, prefill_tokens=16), requests)
    for i in (3, 8):
        assert (found[i].finish_reason, len(found[i].token_ids)) == ("cancelled", 0)
    left = [request for request in _requests() if request.id not in (3, 8)]
    _check({request.id: found[request.id] for request in left}, left)


def test_scores_come_out_while_other_rows_still_wait() -> None:
    engine = _engine("paged", prefill_tokens=32, window_rows=1000)
    asked = 0

    def feed() -> Iterator[Request]:
        nonlocal asked
        for i in range(40):
            for request in _requests():
                request.id += 100 * i
                asked += 1
                yield request

    done = engine.generate(feed())
    next(done)
    waiting = len(engine._scheduler.queue)
    assert waiting > 500
    # What a run shows and is judged by tells of it, too, though no row ever decodes.
    assert engine.stats.steps > 0
    assert engine.stats.computed_tokens > 0
    assert engine.stats.gauges["waiting_rows"] > 500
    done.close()


def test_what_is_scored_crosses_between_the_processes() -> None:
    shared = Scored(np.array([3, 4], np.int32), np.array([1, 0], np.int32))
    own = Scored(np.array([5], np.int32), np.array([0], np.int32))
    requests = [Request(i, PREFIX[:4], 1, scored=one) for i, one in enumerate((shared, None, own, shared))]
    back = list(RequestPack.pack(0, 0, requests).unpack())
    assert [one.scored and one.scored.token_ids.tolist() for one in back] == [[3, 4], None, [5], [3, 4]]
    done = _run(_engine("padded"), [requests[0]])[0]
    (again,) = CompletionPack.pack([done], None).unpack(np.arange(1), {0: 0})
    assert again.values["logprobs"].tolist() == done.values["logprobs"].tolist()
