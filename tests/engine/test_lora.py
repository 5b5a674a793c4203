"""A LoRA adapter in a model's weights: the same numbers as peft's, in both engines, and before they become fp8."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models
import torch
from adapters import make_adapter

from batchrun.engine.choose import load_engine
from batchrun.engine.protocol import EngineSpec, Request
from batchrun.engine.weights import fp8_model
from batchrun.engine.weights.loading import load_model
from batchrun.engine.weights.lora import read_adapter
from batchrun.errors import ModelError

TARGETS = {"gpt2": ("c_attn", "c_proj", "c_fc"), "opt": ("q_proj", "v_proj", "fc1", "fc2")}


def _spec(name: str, **changes: Any) -> EngineSpec:
    folder = str(tiny_models.model_folder(name))
    return EngineSpec(
        **{"kind": "paged", "max_context": tiny_models.MAX_CONTEXT, **changes},
        model_path=folder,
        tokenizer_path=folder,
    )


def _adapter(tmp_path: Path, name: str, **how: Any) -> str:
    targets = TARGETS.get(name, ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    how.setdefault("targets", targets)
    return str(make_adapter(tmp_path / f"{name}-adapter", tiny_models.model_folder(name), **how))


def _peft_model(name: str, adapter: str) -> Any:
    peft = pytest.importorskip("peft")
    return peft.PeftModel.from_pretrained(load_model(_spec(name)), adapter)


def _answers(spec: EngineSpec, requests: list[Request]) -> dict[int, list[int]]:
    return {c.id: c.token_ids.tolist() for c in load_engine(spec).generate(iter(requests))}


@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("llama", {}),
        ("qwen3", {"use_rslora": True}),
        ("mistral", {"alpha_pattern": {"layers.1.self_attn.q_proj": 3, "down_proj": 1.5}}),
        ("gemma2", {"targets": ("q_proj", "v_proj")}),
        ("gpt2", {"fan_in_fan_out": True}),
        ("opt", {"rank": 7}),
    ],
)
def test_merged_logits_are_those_of_peft(tmp_path: Path, name: str, how: dict[str, Any]) -> None:
    adapter = _adapter(tmp_path, name, **how)
    theirs, ours = _peft_model(name, adapter), load_model(_spec(name, adapter=adapter))
    tokens = torch.randint(3, 256, (3, 40), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want, have, base = theirs(tokens).logits, ours(tokens).logits, load_model(_spec(name))(tokens).logits
        merged = theirs.merge_and_unload()(tokens).logits
    torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(have, merged, rtol=1e-5, atol=1e-5)
    assert float((have - base).abs().max()) > 0.1


@pytest.mark.parametrize("kind", ["paged", "padded"])
def test_greedy_answers_with_an_adapter_are_those_of_peft(tmp_path: Path, kind: str) -> None:
    adapter = _adapter(tmp_path, "llama")
    rng = np.random.default_rng(5)
    prompts = [rng.integers(3, 256, length).astype(np.int32) for length in (1, 9, 17, 33, 40)]
    requests = [Request(i, prompt, 12) for i, prompt in enumerate(prompts)]
    answers = _answers(_spec("llama", kind=kind, adapter=adapter), copy.deepcopy(requests))
    theirs = _peft_model("llama", adapter)
    for i, prompt in enumerate(prompts):
        start = torch.from_numpy(prompt.astype(np.int64))[None]
        whole = theirs.generate(
            input_ids=start,
            attention_mask=torch.ones_like(start),
            max_new_tokens=12,
            do_sample=False,
            eos_token_id=None,
        )
        assert answers[i] == whole[0, len(prompt) :].tolist()
    assert answers != _answers(_spec("llama", kind=kind), requests)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_weights_become_fp8_with_the_adapter_in_them(tmp_path: Path, name: str) -> None:
    adapter = _adapter(tmp_path, name)
    loaded = load_model(_spec(name, adapter=adapter, quantization="fp8"))
    converted = load_model(_spec(name, adapter=adapter))
    fp8_model.quantize(converted)
    ours, theirs = dict(loaded.named_parameters()), dict(converted.named_parameters())
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight.float(), theirs[key].float(), rtol=0, atol=0)


def test_every_engine_tells_of_the_adapter(tmp_path: Path) -> None:
    spec = _spec("llama", adapter=_adapter(tmp_path, "llama"))
    assert "the adapter llama-adapter is merged into the weights" in load_engine(spec).stats.notes


def test_an_adapter_of_another_model_is_refused_while_loading(tmp_path: Path) -> None:
    with pytest.raises(
        ModelError, match=r"is for another model: its model.layers.0.* is .*, and the model's "
    ):
        load_model(_spec("qwen3", adapter=_adapter(tmp_path, "mistral")))
    with pytest.raises(ModelError, match=r"another model: this one has no layer model\.layers"):
        load_model(_spec("gpt2", adapter=_adapter(tmp_path, "mistral")))


def test_an_adapter_for_the_logits_does_not_change_embeddings_that_share_their_weight(tmp_path: Path) -> None:
    adapter = _adapter(tmp_path, "llama", targets=("lm_head",))
    with pytest.raises(ModelError, match="lm_head shares its weight with the embeddings"):
        load_model(_spec("llama", adapter=adapter))


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    adapter = _adapter(tmp_path, "llama", size=float("nan"))
    with pytest.raises(ModelError, match=r"numbers of model\.layers\.0\S+ are not finite"):
        read_adapter(adapter)
