"""The branches that only a GPU takes, on a CPU: what they call exists, and gives the answers of the other branches."""

from __future__ import annotations

from typing import Any

import cuda_stand_in
import exact_fp8
import numpy as np
import pytest
import torch
import transformers

pytest.importorskip("triton")

from batchrun.engine.paged import PagedEngine
from batchrun.engine.paged.attention import cascade
from batchrun.engine.paged.attention import cascade_kernels as cascade_attention
from batchrun.engine.paged.attention import operator as attention
from batchrun.engine.paged.attention.flash import FlashAttention
from batchrun.engine.paged.attention.gathered import GatheredPages
from batchrun.engine.paged.device.memory import Budget, affordable_pages
from batchrun.engine.protocol import EngineSpec, Request, Sampling, TokenTables

exact_fp8.use()
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU they are taken anyway")
SHAPE: dict[str, Any] = {
    "vocab_size": 200, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 256, "initializer_range": 0.4,
}  # fmt: skip
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SHAPE, num_local_experts=2, num_experts_per_tok=2, sliding_window=24
    ),
}
WARPED = Sampling(temperature=0.8, top_p=0.9, repetition_penalty=1.2, seed=3)


def _tables() -> TokenTables:
    """Answers of six digits or more, an even number of them; digits are tokens below 60, and others do not occur."""
    token_class = np.where(np.arange(200) < 60, 1, 0).astype(np.int32)
    token_class[199] = 2
    following = np.zeros((9, 3), np.int16)
    following[1] = 1
    following[2:, 1] = [3, 4, 5, 6, 7, 8, 7]
    following[8, 2] = 1
    return TokenTables(token_class, following, 2, "")


def _engine(
    name: str, sampling: Sampling, answers: TokenTables | None = None, cache_dtype: str = "auto"
) -> PagedEngine:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), dtype=torch.float32).eval()
    options: dict[str, object] = {
        "max_rows": 4, "prefill_tokens": 48, "decode_steps": 3, "cache_tokens": 512,
    }  # fmt: skip
    spec = EngineSpec(
        "paged",
        "",
        "",
        sampling=sampling,
        stop_token_ids=(199,),
        max_context=128,
        options=options,
        answers=answers,
        cache_dtype=cache_dtype,
    )
    return PagedEngine(spec, model, page_size=32)


def _answers(engine: PagedEngine) -> dict[int, list[int]]:
    rng = np.random.default_rng(0)
    shared = rng.integers(3, 190, 53)
    prompts = [np.concatenate([shared, rng.integers(3, 190, 5 + 3 * n)]).astype(np.int32) for n in range(4)]
    requests = [Request(n, prompt, 7, n) for n, prompt in enumerate(prompts)]
    answers = {one.id: one.token_ids.tolist() for one in engine.generate(iter(requests))}
    engine._scheduler.check()
    return answers


@pytest.mark.parametrize(
    ("name", "sampling", "cache_dtype"),
    [
        ("llama", Sampling(), "auto"),
        ("llama", WARPED, "fp8"),
        ("gpt_oss", WARPED, "auto"),
        ("gpt_oss", Sampling(), "fp8"),
    ],
    ids=["llama", "llama sampled in fp8", "gpt_oss sampled", "gpt_oss in fp8"],
)
def test_what_only_a_gpu_runs_gives_the_answers_of_a_cpu(
    name: str, sampling: Sampling, cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _answers(_engine(name, sampling, cache_dtype=cache_dtype))
    cuda_stand_in.install(monkeypatch)
    monkeypatch.setattr(attention, "choose_backend", lambda *_: FlashAttention())
    # Few rows and short keys, which are not worth it otherwise.
    for cost, value in {"STEP": 1, "PREFILL": 1, "GROUP": 0, "ROW": 0}.items():
        monkeypatch.setattr(cascade, f"{cost}_COST", value)
    monkeypatch.setattr(cascade, "MIN_PREFIX", 16)
    engine = _engine(name, sampling, cache_dtype=cache_dtype)
    merged = set()
    merge = cascade_attention.merge_prefixes
    monkeypatch.setattr(
        cascade_attention, "merge_prefixes", lambda *call: merged.add(len(call[0])) or merge(*call)
    )
    assert _answers(engine) == expected
    assert cuda_stand_in.Graph.captured > 1
    in_fp8 = ", keys and values in fp8" if cache_dtype == "fp8" else ""
    assert engine.stats.attention == "triton" + in_fp8
    assert engine.stats.device == "a GPU"
    # More than whole pages: some are copied.
    assert engine.stats.shared_tokens > 3 * 32
    # Decode steps of four rows, and the prefill of those that follow the first. A window sees no shared prefix whole.
    assert len(merged) == (2 if name == "llama" else 0)


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(temperature=1.5, top_p=0.9, seed=3)], ids=["greedy", "sampled"]
)
def test_a_gpu_keeps_answers_to_their_form(sampling: Sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = _answers(_engine("llama", sampling, _tables()))
    for answer in expected.values():
        digits = answer[:-1] if answer[-1] == 199 else answer
        assert all(token < 60 for token in digits)
        assert len(digits) == (6 if answer[-1] == 199 else 7)
    cuda_stand_in.install(monkeypatch)
    engine = _engine("llama", sampling, _tables())
    states = engine._runner._states
    assert states is not None
    assert _answers(engine) == expected
    assert cuda_stand_in.Graph.captured > 1
    # A captured step writes where it was captured.
    assert engine._runner._states is states


def test_a_gpu_gets_flash_attention_and_as_many_pages_as_its_memory_has_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    cuda_stand_in.install(monkeypatch)
    engine = _engine("llama", Sampling())
    cache, device = engine._runner.cache, torch.device("cpu")
    assert isinstance(attention.choose_backend(cache.layers, torch.float16, device), FlashAttention)
    assert isinstance(attention.choose_backend(cache.layers, torch.float32, device), GatheredPages)
    budget = Budget.of({"memory_fraction": 0.5}, device)
    warmed: list[bool] = []
    pages = affordable_pages(cache, budget, 128, device, lambda: warmed.append(True))
    # Half of 8 GiB, without the 1 GiB of others and the 2 GiB of the warm-up.
    assert pages == (1 << 30) // cache.page_bytes
    assert warmed
    assert budget.max_rows == 2048
    assert budget.compile
