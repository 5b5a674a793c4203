"""Rows of several adapters in one model: the tokens that each gets from a model with its adapter merged, or none."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import cuda_stand_in
import numpy as np
import pytest
import tiny_models
import torch
from adapters import make_adapter
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.device.compiling import compile_layers
from batchrun.engine.paged.device.projections import fuse_projections
from batchrun.engine.paged.schedule.page_pool import PagePool
from batchrun.engine.processes.wire import RequestPack
from batchrun.engine.protocol import EngineSpec, Request, Sampling, Scored
from batchrun.engine.weights.loading import load_model
from batchrun.engine.weights.lora import Lora
from batchrun.engine.weights.row_adapters import AdaptedLinear, TokenAdapters, attach
from batchrun.errors import ModelError

NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
MODELS = ["llama", "qwen3", "mistral", "gemma2", "opt"]
# Of an adapter each: some layers that another has not, and other ranks.
TARGETS = (
    ("q_proj", "v_proj", "down_proj", "fc2"),
    ("k_proj", "v_proj", "o_proj", "gate_proj", "out_proj", "fc1"),
)
RANKS = (4, 11)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@cache
def _adapters(name: str, folder: Path) -> tuple[str, ...]:
    model = tiny_models.model_folder(name)
    return tuple(
        str(make_adapter(folder / f"{name}-{number}", model, targets, rank, seed=number))
        for number, (targets, rank) in enumerate(zip(TARGETS, RANKS, strict=True))
    )


def _spec(name: str, **changes: Any) -> EngineSpec:
    model = str(tiny_models.model_folder(name))
    return EngineSpec("", model, model, **{"max_context": tiny_models.MAX_CONTEXT, **changes})


def _engine(kind: str, spec: EngineSpec, page_size: int = 16) -> Any:
    model = load_model(spec)
    return PaddedEngine(spec, model) if kind == "padded" else PagedEngine(spec, model, page_size=page_size)


def _requests(seed: int, rows: int, prefix: int = 0, most_new: int = 16) -> list[Request]:
    """Rows of every adapter and of none, in random order, many with the same prompts."""
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, 259, prefix)
    prompts = [np.append(shared, rng.integers(3, 259, rng.integers(1, 50))) for _ in range(-(-rows // 2))]
    return [
        Request(
            number,
            prompts[rng.integers(len(prompts))].astype(np.int32),
            int(rng.integers(1, most_new + 1)),
            int(rng.integers(0, 2**63)),
            adapter=int(rng.integers(0, 3)),
        )
        for number in range(rows)
    ]


def _answers(engine: Any, requests: list[Request]) -> dict[int, list[int]]:
    made = {one.id: one.token_ids.tolist() for one in engine.generate(iter(requests))}
    assert made.keys() == {request.id for request in requests}
    return made


def _apart(kind: str, spec: EngineSpec, requests: list[Request]) -> dict[int, list[int]]:
    """The answers of three engines: without an adapter, and with each merged."""
    answers = {}
    for number, adapter in enumerate((None, *spec.adapters)):
        own = [replace(request, adapter=0) for request in requests if request.adapter == number]
        answers |= _answers(_engine(kind, replace(spec, adapter=adapter, adapters=())), own) if own else {}
    return answers


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=1.0, top_p=0.9, seed=3)])
@pytest.mark.parametrize("kind", ["paged", "padded"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_several_adapters_get_what_models_with_each_merged_give(
    folder: Path, name: str, kind: str, sampling: Sampling
) -> None:
    spec = _spec(name, adapters=_adapters(name, folder), sampling=sampling)
    requests = _requests(seed=1, rows=18)
    assert _answers(_engine(kind, spec), requests) == _apart(kind, spec, requests)


@settings(max_examples=12, phases=NO_SHRINKING)
@given(
    name=st.sampled_from(MODELS),
    seed=st.integers(0, 10**6),
    rows=st.integers(1, 20),
    prefix=st.sampled_from([0, 16, 37, 64]),
    cache_tokens=st.sampled_from([160, 256, 4096]),
    prefill_tokens=st.sampled_from([8, 50, 300]),
    decode_steps=st.integers(1, 16),
    max_rows=st.sampled_from([1, 3, 16]),
)
def test_answers_do_not_depend_on_batch_pool_prefix_or_steps(
    folder: Path, name: str, seed: int, rows: int, prefix: int, **options: int
) -> None:
    spec = _spec(name, adapters=_adapters(name, folder), stop_token_ids=(10**6,))
    requests = _requests(seed, rows, prefix)
    engine = _engine("paged", replace(spec, options=dict(options)))
    assert _answers(engine, requests) == _apart("paged", spec, requests)
    engine._scheduler.check()
    assert engine._scheduler.pool.available == engine._scheduler.pool.num_pages


def test_rows_preempted_in_a_small_pool_keep_their_answers_and_their_adapters(folder: Path) -> None:
    spec = _spec("llama", adapters=_adapters("llama", folder), stop_token_ids=(10**6,))
    requests = [replace(request, max_new_tokens=100) for request in _requests(seed=3, rows=12)]
    engine = _engine("paged", replace(spec, options={"cache_tokens": 480, "max_rows": 16}))
    assert _answers(engine, requests) == _apart("paged", spec, requests)
    assert engine.stats.gauges["preemptions"] > 0


def test_a_prompt_is_computed_for_each_adapter_once(folder: Path) -> None:
    prompt = np.arange(3, 120, dtype=np.int32)
    requests = [Request(number, prompt, 5, adapter=number % 3) for number in range(12)]
    spec = _spec("llama", adapters=_adapters("llama", folder))
    engine = _engine("paged", spec)
    answers = _answers(engine, requests)
    assert len({tuple(answer) for answer in answers.values()}) == 3
    # But for what is less than a page.
    assert 3 * len(prompt) <= engine.stats.prompt_tokens < 3 * len(prompt) + 12 * 16
    # One adapter's rows go after another's.
    queue = engine._scheduler.queue
    for request in requests:
        engine._scheduler.add(request)
    order = [queue.pop().request.adapter for _ in requests]
    assert order == sorted(order)


def test_prompts_of_another_root_have_nothing_in_common() -> None:
    pool, prompt = PagePool(20, 16), np.arange(50, dtype=np.int32)
    pages = pool.allocate(4)
    pool.insert(prompt, pages, 0, 50, b"\1\0\0\0")
    pool.launched()
    assert not pool.match_prefix(prompt).pages
    assert not pool.match_prefix(prompt, 1, b"\2\0\0\0").copied
    match = pool.match_prefix(prompt, 1, b"\1\0\0\0")
    assert (len(match.pages), match.copied) == (3, 0)


@pytest.mark.parametrize("kind", ["paged", "padded"])
def test_scores_are_those_of_the_rows_own_adapter(folder: Path, kind: str) -> None:
    spec = _spec("qwen3", adapters=_adapters("qwen3", folder))
    back = np.array([2, 1, 0], np.int32)
    requests = [
        replace(request, max_new_tokens=1, scored=Scored(request.token_ids[:3], back))
        for request in _requests(seed=8, rows=10)
        if len(request.token_ids) > 3
    ]

    def scores(spec: EngineSpec, requests: list[Request]) -> dict[int, Any]:
        made = _engine(kind, spec).generate(iter(requests))
        return {one.id: one.values["logprobs"] for one in made}

    together = scores(spec, requests)
    for number, adapter in enumerate((None, *spec.adapters)):
        own = [replace(request, adapter=0) for request in requests if request.adapter == number]
        assert own
        for row, values in scores(replace(spec, adapter=adapter, adapters=()), own).items():
            np.testing.assert_allclose(together[row], values, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("name", "compiles"), [("llama", False), ("qwen3", True), ("opt", False)])
def test_joined_and_compiled_layers_give_the_same_logits(folder: Path, name: str, compiles: bool) -> None:
    """Layers of one product of which some have adapters, and tokens of different adapters."""
    spec = _spec(name, adapters=_adapters(name, folder))
    plain, joined = load_model(spec), load_model(spec)
    fused = fuse_projections(joined)
    if compiles:
        compile_layers(joined, [layer.self_attn for layer in joined.get_decoder().layers])
    assert fused == {"llama": 4, "qwen3": 4, "opt": 2}[name]
    for length in (9, 20):
        tokens = torch.randint(3, 259, (1, length), generator=torch.Generator().manual_seed(length))
        of_tokens = torch.arange(length, dtype=torch.int32) % 3
        logits = []
        for model in (plain, joined):
            current = TokenAdapters.of(model)
            assert current is not None
            current.tokens = of_tokens.clone()
            torch._dynamo.mark_dynamic(current.tokens, 0)
            with torch.no_grad():
                logits.append(model(tokens, use_cache=False).logits)
        torch.testing.assert_close(logits[1], logits[0], rtol=1e-4, atol=1e-4)
    weights = [module.weight for module in joined.modules() if hasattr(module, "weight")]
    held = sum({w.untyped_storage().data_ptr(): w.untyped_storage().nbytes() for w in weights}.values())
    alone = sum(weight.numel() * 4 for weight in plain.parameters())
    assert held < 1.6 * alone


def test_what_only_a_gpu_runs_gives_the_answers_of_a_cpu(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"max_rows": 4, "prefill_tokens": 64, "decode_steps": 3, "cache_tokens": 1024}
    spec = _spec("llama", adapters=_adapters("llama", folder), options=options, max_context=128)
    requests = _requests(seed=5, rows=10, prefix=40)
    expected = _answers(_engine("paged", spec, 32), requests)
    cuda_stand_in.install(monkeypatch)
    engine = _engine("paged", spec, 32)
    where = engine._runner._adapter
    assert _answers(engine, requests) == expected
    assert cuda_stand_in.Graph.captured > 1
    # A captured step reads where it was captured.
    assert engine._runner._adapter is where


def test_a_token_without_an_adapter_is_untouched_by_what_adapters_make_of_it() -> None:
    linear = torch.nn.Linear(8, 4)
    endless = Lora(torch.full((2, 8), 1e38), torch.full((4, 2), 1e38))
    current = TokenAdapters(torch.device("cpu"))
    layer = AdaptedLinear.around(linear, {1: endless}, current)
    x = 100 * torch.rand(1, 3, 8)
    current.tokens = torch.tensor([0, 1, 2], dtype=torch.int32)
    out = layer(x)
    torch.testing.assert_close(out[:, [0, 2]], linear(x)[:, [0, 2]])
    assert not bool(out[:, 1].isfinite().any())


def test_a_requests_adapter_crosses_the_wire() -> None:
    requests = _requests(seed=2, rows=9)
    unpacked = list(RequestPack.pack(0, 0, requests).unpack())
    assert [request.adapter for request in unpacked] == [request.adapter for request in requests]


@pytest.mark.parametrize(
    ("name", "targets", "says"),
    [
        ("gpt2", ("c_attn",), "is Conv1D here, and rows have adapters of plain linear layers only"),
        ("qwen3", ("lm_head",), "lm_head gives the logits"),
    ],
)
def test_layers_that_rows_can_have_no_adapter_of_are_refused(
    tmp_path: Path, name: str, targets: tuple[str, ...], says: str
) -> None:
    adapter = make_adapter(tmp_path / "adapter", tiny_models.model_folder(name), targets)
    with pytest.raises(ModelError, match=says):
        load_model(_spec(name, adapters=(str(adapter),)))


def test_an_adapter_of_another_model_is_refused() -> None:
    model = load_model(_spec("llama"))
    lora = Lora(torch.zeros(4, 32), torch.zeros(99, 4))
    with pytest.raises(
        ModelError, match=r"its model.layers.0.mlp.up_proj is 99 x 32, and the model's 64 x 32"
    ):
        attach(model, [{"model.layers.0.mlp.up_proj": lora}], ["mine"])
    with pytest.raises(ModelError, match="this one has no layer nothing"):
        attach(model, [{"nothing": lora}], ["mine"])
