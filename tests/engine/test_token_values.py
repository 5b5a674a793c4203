"""Log probabilities come with every token, the same from both engines, whatever happens to the row on its way."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import model_folder

from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.device.runner import Runner
from batchrun.engine.processes.wire import PLACE_BITS, CompletionPack, RequestPack
from batchrun.engine.protocol import Completion, Engine, EngineSpec, Request, Sampling
from batchrun.engine.tokens.token_values import ValuesOfTokens, first
from batchrun.engine.weights.loading import load_model

GREEDY = Sampling(logprobs=3)
SEEDED = Sampling(temperature=1.3, top_k=40, repetition_penalty=1.2, seed=3, logprobs=3)
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


def _spec(sampling: Sampling, kind: str, **options: Any) -> EngineSpec:
    folder = str(model_folder("llama"))
    return EngineSpec(kind, folder, folder, sampling=sampling, max_context=256, options=options)


def _paged(sampling: Sampling, stops: tuple[int, ...] = (), **options: Any) -> PagedEngine:
    spec = replace(_spec(sampling, "paged", **options), stop_token_ids=stops)
    return PagedEngine(spec, load_model(spec), page_size=16)


def _requests(rows: int = 10, new: int = 14) -> list[Request]:
    rng = np.random.default_rng(2)
    lengths = rng.integers(2, 30, rows)
    return [
        Request(i, rng.integers(3, 200, n).astype(np.int32), new, i * 7919) for i, n in enumerate(lengths)
    ]


def _run(engine: Engine, requests: list[Request]) -> dict[int, Completion]:
    return {one.id: one for one in engine.generate(iter(requests))}


def _check_equal(found: dict[int, Completion], expected: dict[int, Completion]) -> None:
    assert found.keys() == expected.keys()
    for number, one in found.items():
        other = expected[number]
        assert one.token_ids.tolist() == other.token_ids.tolist()
        assert one.values.keys() == other.values.keys()
        for name, column in one.values.items():
            assert len(column) == len(one.token_ids)
            np.testing.assert_allclose(column, other.values[name], **CLOSE, err_msg=f"{name} of row {number}")


@pytest.mark.parametrize("sampling", [GREEDY, SEEDED], ids=["greedy", "seeded"])
def test_both_engines_give_the_models_own_log_probabilities(sampling: Sampling) -> None:
    padded = _run(PaddedEngine.load(_spec(sampling, "padded")), _requests())
    for steps in (1, 5, 16):
        _check_equal(_run(_paged(sampling, decode_steps=steps), _requests()), padded)
    model = load_model(_spec(sampling, "padded"))
    for request in _requests():
        one = padded[request.id]
        whole = torch.tensor(np.concatenate([request.token_ids, one.token_ids])[None].astype(np.int64))
        with torch.no_grad():
            logits = model(input_ids=whole).logits[0, len(request.token_ids) - 1 : -1]
        exact = logits.log_softmax(dim=-1).numpy()
        chosen = exact[np.arange(len(exact)), one.token_ids]
        np.testing.assert_allclose(one.values["logprobs"], chosen, **CLOSE)
        np.testing.assert_allclose(one.values["top_logprobs"], np.sort(exact)[:, :-4:-1], **CLOSE)
        top = np.take_along_axis(exact, one.values["top_tokens"].astype(np.int64), axis=1)
        np.testing.assert_allclose(top, one.values["top_logprobs"], **CLOSE)


def test_preempted_rows_and_rows_cut_at_a_stop_string_keep_theirs() -> None:
    sampling = replace(GREEDY, stop=("a", "e"))
    # A stop token that no model has: the engine hopes for short answers and admits too many rows.
    tight = _paged(sampling, stops=(10**6,), cache_tokens=320, max_rows=16)
    found = _run(tight, _requests(12, new=90))
    assert tight.stats.gauges["preemptions"] > 0
    assert {one.finish_reason for one in found.values()} == {"stop", "length"}
    _check_equal(found, _run(PaddedEngine.load(_spec(sampling, "padded")), _requests(12, new=90)))


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_an_answer_that_goes_on_has_those_of_its_first_tokens_too(kind: str) -> None:
    engine = _paged(SEEDED, decode_steps=4) if kind == "paged" else PaddedEngine.load(_spec(SEEDED, "padded"))
    whole = _run(engine, _requests())
    begun = [
        replace(r, generated=whole[r.id].token_ids[:n], values=first(whole[r.id].values, n))
        for r in _requests()
        for n in [r.id % 5 + 1]
    ]
    _check_equal(_run(engine, begun), whole)


@pytest.mark.parametrize("kind", ["padded", "paged"])
def test_a_job_that_asks_for_none_computes_none(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Sampling()
    engine = _paged(plain) if kind == "paged" else PaddedEngine.load(_spec(plain, "padded"))
    monkeypatch.setattr(torch, "topk", None)
    monkeypatch.setattr(torch.Tensor, "logsumexp", None)
    assert all(one.values == {} for one in _run(engine, _requests(3)).values())
    none = Sampling(logprobs=0)
    monkeypatch.undo()
    engine = _paged(none) if kind == "paged" else PaddedEngine.load(_spec(none, "padded"))
    assert all(one.values.keys() == {"logprobs"} for one in _run(engine, _requests(3)).values())


def test_a_column_of_another_kind_reaches_the_completion_from_one_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def compute(self: ValuesOfTokens, logits: torch.Tensor, tokens: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"doubled": 2 * tokens}

    monkeypatch.setattr(ValuesOfTokens, "compute", compute)
    for engine in (_paged(GREEDY), PaddedEngine.load(_spec(GREEDY, "padded"))):
        for one in _run(engine, _requests(3)).values():
            assert one.values["doubled"].tolist() == (2 * one.token_ids).tolist()


def test_values_cross_between_the_processes_with_their_tokens() -> None:
    values = {"logprobs": np.array([-1.0, -2.0, -3.0], np.float32), "top_tokens": np.arange(6).reshape(3, 2)}
    done = [
        Completion(5, np.array([7], np.int32), "stop", values=first(values, 1)),
        Completion(6, np.empty(0, np.int32), "error"),
        Completion((1 << PLACE_BITS) + 7, np.array([7, 8, 9], np.int32), "length", values=values),
    ]
    pack = CompletionPack.pack(done, None)
    places = np.arange(3)
    back = list(pack.unpack(places, {5: 0, 6: 1, 7: 2}))
    for one, number in ((back[0], 1), (back[1], 0), (back[2], 3)):
        for name, column in values.items():
            assert one.values[name].tolist() == column[:number].tolist()
    begun = replace(_requests(1)[0], generated=np.array([7, 8, 9], np.int32), values=values)
    (sent,) = RequestPack.pack(0, 0, [begun]).unpack()
    assert sent.values["top_tokens"].tolist() == values["top_tokens"].tolist()


def test_a_captured_decode_step_writes_them_to_memory_that_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = _paged(GREEDY, decode_steps=3)
    memory = {name: column.data_ptr() for name, column in engine._runner._values.items()}
    step = Runner._decode_step

    def strict(self: Runner, shape: Any) -> None:
        # What a capture refuses: a value that the host would have to wait for.
        with monkeypatch.context() as patched:
            for name in ("item", "tolist", "cpu", "__bool__"):
                patched.setattr(torch.Tensor, name, None)
            compute = ValuesOfTokens.compute
            step_values = compute(self._values_of_tokens, torch.zeros(2, 9), torch.zeros(2, dtype=torch.long))
        assert step_values.keys() == self._values.keys()
        step(self, shape)

    monkeypatch.setattr(Runner, "_decode_step", strict)
    _run(engine, _requests(4))
    assert {name: column.data_ptr() for name, column in engine._runner._values.items()} == memory
