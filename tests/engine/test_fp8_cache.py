"""Keys and values in fp8: what holds for an engine with the model's own holds with them, too.

The reference is transformers' own attention, to whose keys and values a conversion and back is added.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import exact_fp8
import fp8_reference  # noqa: F401
import numpy as np
import pytest
import tiny_models
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from test_paged_engine import (
    BATCHES,
    MODELS,
    NEVER,
    NO_SHRINKING,
    _logits,
    _long_requests,
    _others,
    _requests,
    _run,
    _tokens,
)

from batchrun.engine.choose import load_engine
from batchrun.engine.layers import fp8
from batchrun.engine.layers.fp8 import FP8, quantize_rows
from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.attention.architecture import Layer
from batchrun.engine.paged.attention.gathered import GatheredPages
from batchrun.engine.paged.attention.metadata import AttentionMetadata
from batchrun.engine.paged.attention.operator import KVCache
from batchrun.engine.paged.schedule.page_pool import PagePool, PrefixMatch
from batchrun.engine.protocol import Completion, EngineSpec, Request, Sampling
from batchrun.engine.weights.loading import load_model
from batchrun.errors import FaultCode, ModelError

# Below the best, in standard deviations of a token's logits: where a number is at the edge between two of fp8, the last
# bit of float32 decides which it becomes.
NEAR = 0.15


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    return {name: tiny_models.make_model(name, root / name) for name in [*MODELS, "t5"]}


@pytest.fixture(scope="module")
def models(folders: dict[str, Path]) -> dict[str, Any]:
    return {name: load_model(_spec(folders[name]), attention="fp8_reference") for name in MODELS}


def _spec(folder: Path, **changes: Any) -> EngineSpec:
    defaults = {"max_context": tiny_models.MAX_CONTEXT, "cache_dtype": "fp8"}
    return EngineSpec("paged", str(folder), str(folder), **{**defaults, **changes})


def _engine(folder: Path, page_size: int = 16, **changes: Any) -> PagedEngine:
    spec = _spec(folder, **changes)
    return PagedEngine(spec, load_model(spec), page_size=page_size)


def _check(model: Any, requests: list[Request], completions: dict[int, Completion]) -> None:
    """Every token is the reference's choice after the tokens before it, or as good as that."""
    same = []
    for request in requests:
        answer = completions[request.id].token_ids
        assert len(answer) == request.max_new_tokens
        logits = _logits(model, request, answer)
        chosen = logits.gather(1, torch.from_numpy(answer.astype(np.int64))[:, None])[:, 0]
        assert ((logits.amax(-1) - chosen) <= NEAR * logits.std(-1)).all()
        same += (chosen == logits.amax(-1)).tolist()
    assert np.mean(same) > 0.98 or same.count(False) < 2


@settings(max_examples=12, phases=NO_SHRINKING)
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
    _check(models[name], requests, completions)


def test_sinks_are_seen_beside_keys_in_fp8() -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(_others()["gpt_oss"], dtype=torch.float32).eval()
    reference = copy.deepcopy(model)
    reference.set_attn_implementation("fp8_reference")
    requests = _requests(seed=15, rows=12, prefix=20)
    engine = PagedEngine(_spec(Path(), options={"cache_tokens": 800}), model, page_size=16)
    _check(reference, requests, _run(engine, requests))


def test_rows_preempted_in_a_small_pool_keep_their_answers(
    folders: dict[str, Path], models: dict[str, Any]
) -> None:
    engine = _engine(folders["llama"], options={"cache_tokens": 320, "max_rows": 16}, stop_token_ids=(NEVER,))
    requests = _long_requests()
    completions = _run(engine, requests)
    assert engine.stats.gauges["preemptions"] > 0
    _check(models["llama"], requests, completions)


def test_what_prompts_have_in_common_is_computed_once_and_copied_with_its_scales(
    folders: dict[str, Path], models: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to the middle of a page, of which each row gets a copy."""
    requests = _requests(seed=4, rows=20, prefix=150)
    engine = _engine(folders["qwen3"], page_size=64)
    _check(models["qwen3"], requests, _run(engine, requests))
    assert engine.stats.shared_tokens >= 19 * 150
    monkeypatch.setattr(PagePool, "match_prefix", lambda *_: PrefixMatch())
    alone = _engine(folders["qwen3"], page_size=64)
    _check(models["qwen3"], requests, _run(alone, requests))
    assert alone.stats.shared_tokens == 0


def test_sampled_tokens_are_the_same_in_every_batch(folders: dict[str, Path]) -> None:
    sampling = Sampling(temperature=0.9, top_k=40, top_p=0.95, repetition_penalty=1.2, seed=5)
    requests = _requests(seed=9, rows=12)
    together = _tokens(_run(_engine(folders["qwen3"], sampling=sampling), requests))
    options = {"max_rows": 3, "decode_steps": 2, "prefill_tokens": 20, "cache_tokens": 160}
    backwards = _tokens(_run(_engine(folders["qwen3"], sampling=sampling, options=options), requests[::-1]))
    # But for a number at the edge of another of fp8, behind which a row may go on otherwise.
    assert sum(together[row] == backwards[row] for row in together) >= 11


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=40, seed=5)])
def test_a_begun_answer_ends_in_the_same_tokens(folders: dict[str, Path], sampling: Sampling) -> None:
    requests = _requests(seed=5, rows=12, prefix=20)
    engine = _engine(folders["mistral"], sampling=sampling, stop_token_ids=(NEVER,))
    whole = _run(engine, requests)
    tokens = {number: one.token_ids for number, one in whole.items()}
    begun = [replace(r, generated=tokens[r.id][: r.id * 5 % len(tokens[r.id])]) for r in requests]
    again = _run(engine, begun)
    assert all(again[r.id].token_ids[: len(r.generated)].tolist() == r.generated.tolist() for r in begun)
    # But for a number at the edge of another of fp8.
    assert sum(again[row].token_ids.tolist() == tokens[row].tolist() for row in tokens) >= 11


def test_a_row_with_broken_logits_fails_alone(folders: dict[str, Path]) -> None:
    requests = _requests(seed=10, rows=12)
    good = _tokens(_run(_engine(folders["qwen3"]), requests))
    broken = next(token for token in range(259, 320) if not any(token in row for row in good.values()))
    engine = _engine(folders["qwen3"], options={"max_rows": 4, "cache_tokens": 512})
    with torch.no_grad():
        engine._runner._model.get_input_embeddings().weight[broken] = float("nan")
    completions = _run(engine, [Request(99, np.array([5, 6, broken, 7], np.int32), 8), *requests])
    fault = completions.pop(99).fault
    assert fault is not None
    assert fault.code == FaultCode.BAD_LOGITS
    assert set(_tokens(completions)) == set(good)
    assert all(one.fault is None for one in completions.values())


def test_a_number_is_off_by_half_a_step_at_most_whatever_its_tokens_and_heads_magnitude(
    folders: dict[str, Path],
) -> None:
    """e4m3 has 3 bits behind the first: half a step is a sixteenth of a number, or of the smallest normal one."""
    model = load_model(_spec(folders["qwen3"]))
    cache = KVCache(model, 16, torch.float32, torch.device("cpu"), fp8=True)
    cache.allocate(4)
    keys, values, scales = cache.of_layer(1)
    assert scales is not None
    generator = torch.Generator().manual_seed(0)
    magnitudes = 10.0 ** torch.randint(-6, 5, (20, 2, 1), generator=generator)
    key, value = (torch.randn(20, 2, 16, generator=generator) * magnitudes for _ in range(2))
    slots = torch.randperm(48, generator=generator)[:20] + 16
    metadata = AttentionMetadata(slots, torch.zeros(20, 1, dtype=torch.int32), torch.ones(20))
    GatheredPages().decode(
        torch.zeros(20, 4, 16), key, value, keys, values, metadata, cache.layers[1], None, scales
    )
    for exact, pages, own in ((key, keys, scales[0]), (value, values, scales[1])):
        assert pages.dtype == FP8
        stored = (pages.float() * own.transpose(1, 2)[..., None]).flatten(0, 1)[slots]
        smallest = exact.abs().amax(-1, keepdim=True) / fp8.FP8_MAX * 2**-6
        assert ((stored - exact).abs() <= torch.maximum(exact.abs(), smallest) / 16 * 1.0001).all()
        error = (stored - exact).norm(dim=-1) / exact.norm(dim=-1)
        assert 0.015 < float(error.mean()) < 0.035
    assert cache.page_bytes * 4 == cache.memory.nbytes + cache.scales.nbytes  # type: ignore[union-attr]


def _planted(tokens: int, place: int, margin: float) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A query, and keys and values of so many tokens: one key whose score is `margin` above the logarithm of all."""
    generator = torch.Generator().manual_seed(place)
    query = torch.randn(1, 2, 64, generator=generator)
    keys, values = (torch.randn(tokens, 1, 64, generator=generator) for _ in range(2))
    keys *= 0.5
    # Both heads of the group look for it.
    query[:, 1] = query[:, 0]
    keys[place] = query[0, :1] * (np.log(tokens) + margin) / query[0, 0].square().sum() * 8
    return query, keys, values


@pytest.mark.parametrize(
    ("kernels", "tokens", "place"),
    [
        ("reference", 1000, 3),
        ("reference", 16000, 7001),
        ("reference", 16000, 15998),
        # Of two and of six splits of keys: the interpreter takes seconds for each.
        ("triton", 1000, 3),
        ("triton", 1000, 998),
        ("triton", 3000, 1700),
    ],
)
def test_a_planted_key_is_found_in_a_long_context_as_with_exact_keys(
    kernels: str, tokens: int, place: int
) -> None:
    layer = Layer(query_heads=2, kv_heads=1, head_dim=64, scale=64**-0.5)
    query, keys, values = _planted(tokens, place, margin=3.0)
    pages = -(-tokens // 256)
    key_cache, value_cache = (torch.zeros(pages, 256, 1, 64, dtype=FP8) for _ in range(2))
    scales = torch.zeros(2, pages, 1, 256)
    for number, (exact, cache) in enumerate(((keys, key_cache), (values, value_cache))):
        rows, own = quantize_rows(exact[:, 0])
        cache.view(torch.uint8).flatten(0, 2)[:tokens] = rows.view(torch.uint8)
        scales[number].flatten()[:tokens] = own[:, 0]
    slot, table = torch.tensor([tokens - 1]), torch.arange(pages, dtype=torch.int32)[None]
    seq_lens = torch.tensor([tokens], dtype=torch.int32)
    if kernels == "triton":
        pytest.importorskip("triton")
        from batchrun.engine.paged.attention import decode as decode_attention

        exact_fp8.use()
        out, _ = decode_attention.decode(
            query, keys[-1:], values[-1:], key_cache, value_cache, slot, table, seq_lens, None, layer, scales
        )
    else:
        out = GatheredPages().decode(
            query, keys[-1:], values[-1:], key_cache, value_cache,
            AttentionMetadata(slot, table, seq_lens), layer, None, scales,
        )  # fmt: skip
    weights = (torch.einsum("hd,kd->hk", query[0], keys[:, 0]) * layer.scale).softmax(-1)
    assert float(weights[0, place]) > 0.9
    exact_out = weights @ values[:, 0]
    # Rounding of the one value that counts, and of its share.
    assert float((out[0] - exact_out).norm() / exact_out.norm()) < 0.05
    found = torch.nn.functional.cosine_similarity(out[0], values[:, 0][:, None], dim=-1)
    assert found.argmax(0).tolist() == [place, place]


def test_half_the_memory_holds_as_many_tokens(folders: dict[str, Path]) -> None:
    plain, in_fp8 = (_engine(folders["llama"], cache_dtype=dtype)._runner.cache for dtype in ("auto", "fp8"))
    head_dim = plain.layers[0].head_dim
    # The scale is a number of four bytes; this CPU's own format has four, too.
    assert in_fp8.page_bytes * 4 * head_dim == plain.page_bytes * (head_dim + 4)


def test_where_keys_cannot_be_in_fp8_a_job_is_refused_in_a_line(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(spec: EngineSpec) -> str:
        with pytest.raises(ModelError) as caught:
            load_engine(spec)
        assert "\n" not in str(caught.value)
        assert "engine.cache_dtype" in str(caught.value)
        return str(caught.value)

    kinds = {
        kind: EngineSpec(kind, *[str(folders["llama"])] * 2, cache_dtype="fp8") for kind in ("padded", "auto")
    }
    assert "only the paged engine" in refused(kinds["padded"])
    t5 = EngineSpec("auto", *[str(folders["t5"])] * 2, cache_dtype="fp8")
    assert "cannot run this model, since" in refused(t5)
    # Without a wish for fp8 it would be the padded one here.
    stats = load_engine(kinds["auto"]).stats
    assert stats.engine == "paged"
    assert any(note.startswith("a CPU has no use for keys and values in fp8") for note in stats.notes)
    monkeypatch.setattr(
        "batchrun.engine.paged.device.device_side.unsupported_device", lambda device: "it is too old"
    )
    assert "keys and values in fp8 cannot run here, since it is too old" in refused(kinds["auto"])
