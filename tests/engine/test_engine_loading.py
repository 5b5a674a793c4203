"""Models from folders, engines by name: what is refused, and how it is said."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONFIGS, model_folder
from transformers import ViTConfig, ViTModel

from batchrun.engine import choose
from batchrun.engine.choose import load_engine, why_not_paged
from batchrun.engine.instant import InstantEngine
from batchrun.engine.padded.engine import PaddedEngine
from batchrun.engine.protocol import EngineSpec, Request, Sampling
from batchrun.engine.weights.loading import choose_dtype, load_config, load_model
from batchrun.errors import JobError, ModelError


def spec(folder: Path | str, kind: str = "padded", **changes) -> EngineSpec:
    return EngineSpec(kind, str(folder), str(folder), **changes)


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("llama"), tmp_path / "model"))


def pickle_weights(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def drop_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def change_config(**changes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | changes))

    return change


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (shutil.rmtree, "no such folder; give a folder"),
        (lambda folder: (folder / "config.json").unlink(), "cannot be loaded"),
        (lambda folder: (folder / "config.json").write_text("{"), "cannot be loaded"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"no weights \(\*.safetensors\); copy"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"<html>not found"), "cannot be loaded"),
        (pickle_weights, "weights are pickled, which can run code; .*model.allow_pickle: true"),
        (drop_a_weight, "1 weights are missing .*, such as model.layers.1.mlp.up_proj.weight"),
        (change_config(intermediate_size=96), "6 weights are missing or of another shape"),
        (change_config(model_type="unheard-of"), "cannot be loaded"),
        (
            change_config(model_type="own", auto_map={"AutoConfig": "own.Config"}),
            "needs Python code that comes with it; set model.trust_remote_code: true",
        ),
    ],
    ids=[
        "no folder", "no config", "bad config", "no weights", "bad weights", "pickle", "missing weight",
        "other shape", "unknown type", "remote code",
    ],
)  # fmt: skip
def test_a_folder_that_is_no_model_is_a_clear_error(copied, spoil, message):
    spoil(copied)
    with pytest.raises(ModelError, match=message) as error:
        load_model(spec(copied))
    assert str(copied) in str(error.value)
    assert "\n" not in str(error.value)


def test_pickled_weights_load_when_they_are_accepted(copied):
    expected = load_model(spec(copied)).state_dict()
    pickle_weights(copied)
    loaded = load_model(spec(copied, allow_pickle=True)).state_dict()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)


def test_a_model_that_cannot_generate_is_refused(tmp_path):
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTModel(ViTConfig(**size)).save_pretrained(tmp_path)
    with pytest.raises(ModelError):
        load_model(spec(tmp_path))


@pytest.mark.parametrize("name", CONFIGS)
def test_models_load_ready_for_inference(name):
    model = load_model(spec(model_folder(name)))
    assert not model.training
    assert model.can_generate()
    assert model.dtype == torch.float32


@pytest.mark.parametrize(
    ("asked", "device", "stored", "dtype"),
    [
        ("auto", "cpu", "bfloat16", torch.float32),
        ("bfloat16", "cpu", "float32", torch.bfloat16),
        ("auto", "cuda", "float32", torch.bfloat16),
        ("auto", "cuda", "float16", torch.float16),
        ("float32", "cuda", "bfloat16", torch.float32),
    ],
)
def test_auto_is_float32_on_a_cpu_and_half_precision_on_a_gpu(copied, asked, device, stored, dtype):
    change_config(dtype=stored)(copied)
    asked_for = spec(copied, dtype=asked, device=device)
    assert choose_dtype(asked_for, load_config(asked_for)) == dtype


def test_stop_strings_without_a_tokenizer_are_refused(tmp_path):
    wanted = replace(
        spec(model_folder("llama")), tokenizer_path=str(tmp_path), sampling=Sampling(stop=("\n",))
    )
    with pytest.raises(ModelError, match=r"stop strings need a tokenizer.*or leave generation.stop out"):
        PaddedEngine.load(wanted)
    PaddedEngine.load(replace(wanted, sampling=Sampling()))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("padding", "no engine 'padding'; use auto, padded, paged, or module:Class"),
        ("no_such_module:Engine", "cannot be imported.*installed on every worker"),
        ("batchrun.engine.padded.engine:Absent", "cannot be imported"),
        ("fake_engines:NoEngine", "has no load and no generate"),
    ],
)
def test_an_engine_that_does_not_exist_is_the_jobs_error(kind, message):
    with pytest.raises(JobError, match=f"engine.kind: .*{message}"):
        load_engine(spec("nowhere", kind))


def test_an_engine_of_the_users_own_is_loaded_by_name():
    assert isinstance(load_engine(spec("nowhere", "batchrun.engine.instant:InstantEngine")), InstantEngine)


class PagedForHalf(InstantEngine):
    """Supports no encoder-decoder model, like the real one."""

    @staticmethod
    def unsupported(spec: EngineSpec) -> str | None:
        return "t5 is an encoder-decoder model" if load_config(spec).is_encoder_decoder else None


def test_auto_is_paged_where_it_can_and_says_why_where_it_cannot(monkeypatch):
    monkeypatch.setitem(choose.BUILT_IN, "paged", f"{__name__}:PagedForHalf")
    on_cpu = load_engine(spec(model_folder("llama"), "auto"))
    assert isinstance(on_cpu, PaddedEngine)
    assert "padded engine, since it is the faster one on a CPU" in on_cpu.stats.notes
    llama, t5 = (replace(spec(model_folder(name), "auto"), device="cuda") for name in ("llama", "t5"))
    assert why_not_paged(llama) is None
    assert why_not_paged(t5) == "t5 is an encoder-decoder model"
    monkeypatch.setitem(choose.BUILT_IN, "paged", "no_such_module:PagedEngine")
    assert "cannot be imported" in str(why_not_paged(llama))


def test_auto_with_several_gpus_is_paged_or_refused(monkeypatch):
    monkeypatch.setitem(choose.BUILT_IN, "paged", f"{__name__}:PagedForHalf")
    assert isinstance(load_engine(spec(model_folder("llama"), "auto", gpus=2)), PagedForHalf)
    with pytest.raises(ModelError, match=r"2 GPUs for one engine need the paged engine.* encoder-decoder"):
        load_engine(spec(model_folder("t5"), "auto", gpus=2))


def test_an_engine_says_that_torch_is_compiled_at_every_start_and_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.setattr(sys, "pycache_prefix", str(tmp_path))
    assert "PYTHONDONTWRITEBYTECODE" in str(load_engine(spec(model_folder("llama"))).stats.notes)
    cached = Path(importlib.util.cache_from_source(torch.__file__))
    cached.parent.mkdir(parents=True)
    cached.touch()
    assert "PYTHONDONTWRITEBYTECODE" not in str(load_engine(spec(model_folder("llama"))).stats.notes)


def test_the_instant_engine_answers_with_the_start_of_the_prompt():
    requests = [Request(i, np.arange(i + 1, dtype=np.int32), 4) for i in range(8)]
    engine = InstantEngine.load(spec("nowhere"))
    answers = {c.id: c.token_ids.tolist() for c in engine.generate(iter([None, *requests]))}
    assert answers == {i: list(range(min(4, i + 1))) for i in range(8)}
    assert engine.stats.padding_efficiency == 1.0
