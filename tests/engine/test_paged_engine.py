"""The paged engine against transformers itself, on a CPU in float32."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from batchrun.engine.paged import PagedEngine, unsupported
from batchrun.engine.paged.attention.architecture import Unsupported, attention_layers
from batchrun.engine.paged.attention.gathered import GatheredPages
from batchrun.engine.paged.device.compiling import compile_layers
from batchrun.engine.paged.device.projections import fuse_projections
from batchrun.engine.paged.engine import PREFILLS_AHEAD
from batchrun.engine.paged.schedule.page_pool import PagePool, PrefixMatch
from batchrun.engine.protocol import Completion, EngineSpec, Request, Sampling
from batchrun.engine.weights.loading import load_model
from batchrun.errors import FaultCode, ModelError

# A smaller failing case is not worth minutes of the suite.
NO_SHRINKING = (Phase.explicit, Phase.reuse, Phase.generate)
MODELS = ["llama", "qwen3", "mistral", "gemma2", "gpt2", "opt"]
BATCHES: dict[str, Any] = {
    "seed": st.integers(0, 10**6),
    "rows": st.integers(1, 20),
    "prefix": st.sampled_from([0, 5, 16, 37, 64]),
    "cache_tokens": st.sampled_from([160, 256, 400, 4096]),
    "prefill_tokens": st.sampled_from([8, 50, 300]),
    "decode_steps": st.integers(1, 16),
    "max_rows": st.sampled_from([1, 3, 16, 64]),
}

NEVER = 10**6  # a stop token that no model has: the engine then learns how long answers are


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.make_model(name, root / name) for name in tiny_models.CONFIGS}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    """Each model once as transformers runs it; it stops only where it is told to."""
    loaded = {name: load_model(_spec(folders[name]), attention="eager") for name in MODELS}
    for model in loaded.values():
        model.generation_config.eos_token_id = None
    return loaded


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    return EngineSpec(
        "paged", str(folder), str(folder), **{"max_context": tiny_models.MAX_CONTEXT, **changes}
    )


def _engine(folder: Path, page_size: int = 16, **changes: Any) -> PagedEngine:
    """With small pages, so that short rows have several."""
    spec = _spec(folder, **changes)
    return PagedEngine(spec, load_model(spec), page_size=page_size)


def _requests(seed: int, rows: int, longest: int = 60, most_new: int = 24, prefix: int = 0) -> list[Request]:
    rng = np.random.default_rng(seed)
    shared = rng.integers(3, 259, prefix)
    return [
        Request(
            id=number,
            token_ids=np.concatenate([shared, rng.integers(3, 259, rng.integers(1, longest))]).astype(
                np.int32
            ),
            max_new_tokens=int(rng.integers(1, most_new + 1)),
            row_seed=int(rng.integers(0, 2**63)),
        )
        for number in range(rows)
    ]


def _long_requests() -> list[Request]:
    """Of which a small pool cannot hold as many as it hoped."""
    return [Request(r.id, r.token_ids, max_new_tokens=100) for r in _requests(seed=3, rows=12, longest=16)]


def _logits(model: Any, request: Request, answer: np.ndarray) -> torch.Tensor:
    """(answer's tokens, vocabulary), from which each of them was chosen: in one forward pass."""
    whole = torch.tensor(np.concatenate([request.token_ids, answer])[None].astype(np.int64))
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=whole, use_cache=False).logits
    return logits[0, len(request.token_ids) - 1 : -1]


def _run(engine: PagedEngine, requests: list[Request]) -> dict[int, Completion]:
    """Every request completes exactly once, and afterwards no page is held."""
    completions = list(engine.generate(iter(requests)))
    engine._scheduler.check()
    assert sorted(c.id for c in completions) == sorted(r.id for r in requests)
    assert engine._scheduler.pool.available == engine._scheduler.pool.num_pages
    return {c.id: c for c in completions}


def _tokens(completions: dict[int, Completion]) -> dict[int, list[int]]:
    return {number: completion.token_ids.tolist() for number, completion in completions.items()}


def _check_greedy(model: Any, requests: list[Request], completions: dict[int, Completion]) -> None:
    """Every token is the likeliest one after the tokens before it, so by induction what `generate` answers.

    One forward pass over the row's prompt and answer, instead of one per token."""
    for request in requests:
        answer = completions[request.id].token_ids
        assert len(answer) == request.max_new_tokens
        assert completions[request.id].finish_reason == "length"
        logits = _logits(model, request, answer)
        assert answer.tolist() == logits.argmax(dim=-1).tolist()


@pytest.mark.parametrize("name", MODELS)
def test_greedy_tokens_equal_generate_row_by_row(
    name: str, folders: dict[str, Path], models: dict[str, Any]
) -> None:
    requests = _requests(seed=1, rows=5, most_new=12)
    completions = _run(_engine(folders[name]), requests)
    for request in requests:
        prompt = torch.tensor(request.token_ids[None].astype(np.int64))
        config = transformers.GenerationConfig(
            max_new_tokens=request.max_new_tokens, do_sample=False, pad_token_id=0
        )
        out = models[name].generate(prompt, attention_mask=torch.ones_like(prompt), generation_config=config)
        assert completions[request.id].token_ids.tolist() == out[0, prompt.shape[1] :].tolist()


@settings(max_examples=20, phases=NO_SHRINKING)
@given(name=st.sampled_from(MODELS), **BATCHES)
def test_greedy_tokens_do_not_depend_on_batch_pool_prefix_or_steps(
    folders: dict[str, Path],
    models: dict[str, Any],
    name: str,
    seed: int,
    rows: int,
    prefix: int,
    **options: int,
) -> None:
    requests = _requests(seed, rows, prefix=prefix)
    completions = _run(_engine(folders[name], options=dict(options), stop_token_ids=(NEVER,)), requests)
    _check_greedy(models[name], requests, completions)


def test_rows_preempted_in_a_small_pool_keep_their_answers(
    folders: dict[str, Path], models: dict[str, Any]
) -> None:
    # Hoping for short answers, it admits too many rows.
    engine = _engine(folders["llama"], options={"cache_tokens": 320, "max_rows": 16}, stop_token_ids=(NEVER,))
    requests = _long_requests()
    completions = _run(engine, requests)
    assert engine.stats.gauges["preemptions"] > 0
    _check_greedy(models["llama"], requests, completions)


@pytest.mark.parametrize("prefix", [20, 64, 150])
def test_a_shared_prefix_is_computed_once(
    folders: dict[str, Path], models: dict[str, Any], prefix: int
) -> None:
    engine = _engine(folders["qwen3"], page_size=64)
    requests = _requests(seed=4, rows=20, prefix=prefix)
    completions = _run(engine, requests)
    _check_greedy(models["qwen3"], requests, completions)
    assert engine.stats.shared_tokens >= 19 * prefix
    assert engine.stats.prompt_tokens <= sum(len(r.token_ids) for r in requests) - 19 * prefix


def test_answers_are_the_same_as_without_sharing_whatever_prompts_have_in_common(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of documents within instructions, of some pages and of parts of pages, in random order."""
    rng = np.random.default_rng(11)
    instructions = rng.integers(3, 259, 21)
    documents = [np.append(instructions, rng.integers(3, 259, n)) for n in (5, 17, 40, 66, 90)]
    requests = []
    for number in range(60):
        document = documents[rng.integers(len(documents))]
        prompt = np.append(
            document[: rng.integers(1, len(document) + 1)], rng.integers(3, 259, rng.integers(1, 9))
        )
        requests.append(Request(number, prompt.astype(np.int32), int(rng.integers(1, 12))))

    def run(page_size: int, tokens: int) -> tuple[dict[int, list[int]], int]:
        options = {"max_rows": 8, "prefill_tokens": 150, "cache_tokens": tokens}
        engine = _engine(folders["qwen3"], page_size, options=options, stop_token_ids=(NEVER,))
        return _tokens(_run(engine, requests)), engine.stats.shared_tokens

    shared = {size: run(size, tokens) for size, tokens in ((32, 1024), (256, 3000))}
    monkeypatch.setattr(PagePool, "match_prefix", lambda *_: PrefixMatch())
    apart, none = run(32, 1024)
    assert none == 0
    for answers, tokens in shared.values():
        assert answers == apart
        assert tokens > 0.5 * sum(len(request.token_ids) for request in requests)


def test_a_prompt_asked_twice_is_computed_once_but_for_its_last_token(
    folders: dict[str, Path], models: dict[str, Any]
) -> None:
    engine = _engine(folders["llama"])
    first = _requests(seed=5, rows=1, longest=2, prefix=64)
    _run(engine, first)
    before = engine.stats.computed_tokens
    _check_greedy(models["llama"], first, _run(engine, first))
    decoded = 2 * (first[0].max_new_tokens - 1)  # the smallest decode step is made for two rows
    # An answer's last token counts as computed too, though it is never run.
    assert engine.stats.computed_tokens - before <= 8 + decoded + 1


def test_padding_is_next_to_nothing(folders: dict[str, Path]) -> None:
    engine = _engine(folders["llama"])
    _run(engine, _requests(seed=6, rows=200, most_new=60))
    assert engine.stats.padding_efficiency > 0.85
    assert engine.stats.completions == engine.stats.requests == 200


@pytest.mark.parametrize("max_rows", [5, 17])
def test_any_number_of_rows_may_be_the_most(
    folders: dict[str, Path], models: dict[str, Any], max_rows: int
) -> None:
    """Steps are made for few different numbers of sequences, of which this is none."""
    engine = _engine(folders["llama"], options={"max_rows": max_rows}, sampling=Sampling(logprobs=1))
    requests = _requests(seed=16, rows=2 * max_rows, longest=8, most_new=6)
    _check_greedy(models["llama"], requests, _run(engine, requests))


def test_a_stop_token_ends_its_row_alone(folders: dict[str, Path]) -> None:
    requests = [Request(r.id, r.token_ids, max_new_tokens=40) for r in _requests(seed=7, rows=30)]
    free = _tokens(_run(_engine(folders["llama"]), requests))
    stops = (int(free[0][5]), int(free[1][9]))
    for steps in (1, 8):
        stopped = _run(
            _engine(folders["llama"], stop_token_ids=stops, options={"decode_steps": steps}), requests
        )
        assert any(c.finish_reason == "stop" for c in stopped.values())
        for number, tokens in free.items():
            end = next((i + 1 for i, token in enumerate(tokens) if token in stops), None)
            assert stopped[number].token_ids.tolist() == tokens[:end]
            assert stopped[number].finish_reason == ("stop" if end is not None else "length")


@pytest.mark.parametrize("steps", [1, 3, 16])
def test_a_stop_string_ends_its_row_at_the_token_that_completes_it(
    folders: dict[str, Path], steps: int
) -> None:
    requests = [Request(r.id, r.token_ids, max_new_tokens=40) for r in _requests(seed=8, rows=20)]
    free = _tokens(_run(_engine(folders["llama"]), requests))
    tokenizer = tiny_models.make_tokenizer()
    plain = next(
        t for t in free.values() if all(3 <= x < 259 for x in t[4:7]) and tokenizer.decode(t[4:7]).isascii()
    )
    stop = tokenizer.decode(plain[4:7])
    stopped = _run(
        _engine(folders["llama"], sampling=Sampling(stop=(stop,)), options={"decode_steps": steps}), requests
    )
    for number, tokens in free.items():
        ends = [
            i
            for i in range(1, len(tokens) + 1)
            if stop in tokenizer.decode(tokens[:i], skip_special_tokens=True)
        ]
        assert stopped[number].token_ids.tolist() == (tokens[: ends[0]] if ends else tokens)
        assert stopped[number].finish_reason == ("stop" if ends else "length")
    assert "stop" in {c.finish_reason for c in stopped.values()}


def test_sampled_tokens_are_the_same_in_every_batch(folders: dict[str, Path]) -> None:
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, min_p=0.01, repetition_penalty=1.2, seed=5)
    requests = _requests(seed=9, rows=24)
    together = _tokens(_run(_engine(folders["qwen3"], sampling=sampling), requests))
    options = {"max_rows": 3, "decode_steps": 2, "prefill_tokens": 20, "cache_tokens": 160}
    backwards = _tokens(_run(_engine(folders["qwen3"], sampling=sampling, options=options), requests[::-1]))
    other = _tokens(_run(_engine(folders["qwen3"], sampling=Sampling(temperature=0.9, seed=6)), requests))
    assert together == backwards
    assert together != other


def test_a_row_with_broken_logits_fails_alone(folders: dict[str, Path]) -> None:
    requests = _requests(seed=10, rows=12)
    good = _tokens(_run(_engine(folders["qwen3"]), requests))
    broken = next(token for token in range(259, 320) if not any(token in row for row in good.values()))
    engine = _engine(folders["qwen3"], options={"max_rows": 4, "cache_tokens": 512})
    with torch.no_grad():
        engine._runner._model.get_input_embeddings().weight[broken] = float("nan")
    bad = Request(99, np.array([5, 6, broken, 7], np.int32), 8)
    completions = _run(engine, [bad, *requests, Request(100, bad.token_ids, 8)])
    for number in (99, 100):
        fault = completions.pop(number).fault
        assert fault is not None
        assert fault.code == FaultCode.BAD_LOGITS
    assert _tokens(completions) == good


def test_a_row_that_never_fits_fails_alone(folders: dict[str, Path], models: dict[str, Any]) -> None:
    engine = _engine(folders["llama"], options={"cache_tokens": 160})
    requests = _requests(seed=11, rows=6)
    long = Request(77, np.full(150, 5, np.int32), 20)
    completions = _run(engine, [*requests[:3], long, *requests[3:]])
    fault = completions.pop(77).fault
    assert fault is not None
    assert fault.code == FaultCode.OUT_OF_MEMORY
    _check_greedy(models["llama"], requests, completions)


def test_a_row_may_fill_the_context_to_its_last_token(
    folders: dict[str, Path], models: dict[str, Any]
) -> None:
    prompt = np.arange(tiny_models.MAX_CONTEXT - 7, dtype=np.int32) % 256 + 3
    requests = [Request(0, prompt, 7), Request(1, prompt[:1], tiny_models.MAX_CONTEXT - 1)]
    _check_greedy(models["opt"], requests, _run(_engine(folders["opt"]), requests))


def test_requests_are_pulled_as_room_appears_and_none_means_later(folders: dict[str, Path]) -> None:
    engine = _engine(folders["llama"], options={"window_rows": 4, "max_rows": 2})
    requests = _requests(seed=12, rows=20)
    pulled = 0

    def feed() -> Iterator[Request | None]:
        nonlocal pulled
        for request in requests:
            yield None
            pulled += 1
            yield request

    ids = []
    for completion in engine.generate(feed()):
        ids.append(completion.id)
        assert pulled - len(ids) <= 4 + 2 + 2 + 1
    assert sorted(ids) == list(range(20))


def test_what_the_kernels_have_to_tell_the_user_is_told_once(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    monkeypatch.setattr(GatheredPages, "notes", notes)
    engine = _engine(folders["llama"])
    for request in _requests(0, 2):
        _run(engine, [request])
        notes[:] = ["slower, since"]
        _run(engine, [request])
    assert engine.stats.notes == ["slower, since"]


def test_a_closed_stream_leaves_the_engine_usable(folders: dict[str, Path], models: dict[str, Any]) -> None:
    engine = _engine(folders["llama"])
    requests = _requests(seed=13, rows=30)
    stream = engine.generate(iter(requests))
    next(stream)
    stream.close()
    engine._scheduler.check()
    _check_greedy(models["llama"], requests, _run(engine, requests))


def test_joined_and_compiled_layers_give_the_same_tokens_and_compile_once(folders: dict[str, Path]) -> None:
    requests = _requests(seed=14, rows=30)
    plain = _tokens(_run(_engine(folders["qwen3"]), requests))
    engine = _engine(folders["qwen3"])
    model = engine._runner._model
    assert fuse_projections(model) == 4
    assert compile_layers(model, engine._runner.cache.modules) == 2
    torch._dynamo.utils.counters.clear()
    assert _tokens(_run(engine, requests)) == plain
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize("name", MODELS)
def test_causal_attention_models_are_supported(name: str, folders: dict[str, Path]) -> None:
    assert unsupported(_spec(folders[name])) is None


def _others() -> dict[str, Any]:
    """Architectures that differ in what they ask of attention: sinks, experts, joined weights, odd positions."""
    shape = {
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "initializer_range": 0.4, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip
    few = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return {
        "gpt_oss": transformers.GptOssConfig(**shape, **few, head_dim=16, sliding_window=8),
        "mixtral": transformers.MixtralConfig(**shape, **few),
        "phi3": transformers.Phi3Config(**shape),
        "gemma3": transformers.Gemma3TextConfig(**shape, head_dim=16, sliding_window=8),
        "granite": transformers.GraniteConfig(**shape),
        "glm4": transformers.Glm4Config(**shape, head_dim=8),
    }


@pytest.mark.parametrize("name", list(_others()))
def test_greedy_tokens_of_less_common_architectures(name: str) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_others()[name], dtype=torch.float32).eval()
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("eager")
    requests = _requests(seed=15, rows=12, prefix=20)
    engine = PagedEngine(_spec(Path(), options={"cache_tokens": 800}), model, page_size=16)
    _check_greedy(reference, requests, _run(engine, requests))


@pytest.mark.parametrize(("name", "word"), [("t5", "causal"), ("mamba", "attention")])
def test_other_models_are_refused_with_the_reason(name: str, word: str, folders: dict[str, Path]) -> None:
    reason = unsupported(_spec(folders[name]))
    assert reason is not None
    assert word in reason
    assert "\n" not in reason
    if name == "mamba":
        with pytest.raises(ModelError, match="attention"):
            PagedEngine.load(_spec(folders[name]))


def test_a_model_that_remembers_outside_of_attention_is_refused(tmp_path: Path) -> None:
    config = transformers.FalconH1Config(
        vocab_size=320, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.4,
    )  # fmt: skip
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(Unsupported, match="outside of attention"):
        attention_layers(model)
    config.save_pretrained(tmp_path)
    assert "outside of attention" in str(unsupported(_spec(tmp_path)))


def test_an_embedding_that_changes_with_the_longest_row_is_refused(tmp_path: Path) -> None:
    config = tiny_models.CONFIGS["llama"]()
    config.rope_parameters = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    config.save_pretrained(tmp_path)
    reason = unsupported(_spec(tmp_path))
    assert reason is not None
    assert "dynamic" in reason


def test_rows_that_are_finished_do_not_wait_until_all_prompts_are_launched(folders: dict[str, Path]) -> None:
    engine = _engine(folders["llama"], options={"prefill_tokens": 16})
    prompt = np.arange(3, 19, dtype=np.int32)
    rows = engine.generate(Request(number, prompt + number, 1) for number in range(8))
    next(rows)
    assert engine._runner.launches <= PREFILLS_AHEAD + 1
    assert len([*rows]) == 7


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_a_prefill_ends_its_last_layer_for_the_wanted_tokens_alone(
    folders: dict[str, Path], name: str
) -> None:
    engine = _engine(folders[name])
    computed = []
    for layer in engine._runner._model.model.layers:
        layer.mlp.register_forward_pre_hook(lambda module, given: computed.append(given[0].shape[1]))
    list(engine.generate(iter(_requests(0, rows=9, most_new=1))))
    assert computed[0] > 9
    assert computed[-1] == 9
