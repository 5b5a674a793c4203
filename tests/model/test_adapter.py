"""An adapter is held against its base model by looks at files alone, and is part of what pins an output."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny_models
from adapters import make_adapter
from mistakes import job_of, refused

from batchrun.job.settings import ModelSettings
from batchrun.model.adapter import check_adapter
from batchrun.model.folder import ModelFolder, resolve


def _config(**keys: Any) -> Callable[[Path], object]:
    def change(adapter: Path) -> None:
        path = adapter / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))

    return change


def _pickled(adapter: Path) -> None:
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")


def _cut_short(adapter: Path) -> None:
    weights = adapter / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def _of_another_size(adapter: Path) -> None:
    make_adapter(adapter, tiny_models.model_folder("qwen3"))


def _of_more_layers(adapter: Path) -> None:
    make_adapter(adapter, tiny_models.model_folder("opt"), ["fc1"])


# What is changed in the folder of a right adapter, where the message points, and what it advises.
MISTAKES = {
    "another folder": (lambda a: (a / "adapter_config.json").unlink(), "no adapter_config.json", "save_pretrained"),
    "no JSON": (lambda a: (a / "adapter_config.json").write_text("{"), "adapter_config.json", "restore"),
    "a model": (lambda a: (a / "adapter_config.json").write_text("{}"), "no configuration of a PEFT", "restore"),
    "no LoRA": (_config(peft_type="IA3"), "type IA3", "merge_and_unload"),
    "DoRA": (_config(use_dora=True), "use_dora", "merge_and_unload"),
    "biases": (_config(bias="lora_only"), "bias: lora_only", "merge_and_unload"),
    "a head of its own": (_config(modules_to_save=["lm_head"]), "modules_to_save", "merge_and_unload"),
    "another base": (_config(init_lora_weights="pissa_niter_4"), "init_lora_weights: pissa", "merge_and_unload"),
    "pickled": (_pickled, "adapter_model.bin", "save the adapter again"),
    "no weights": (lambda a: (a / "adapter_model.safetensors").unlink(), "no adapter_model", "save_pretrained"),
    "cut short": (_cut_short, "adapter_model.safetensors", "copy the file again"),
    "another size": (_of_another_size, "its model.layers.0.self_attn.o_proj is 32 x 64", "trained on"),
    "other layers": (_of_more_layers, "no layer model.decoder.layers.0.fc1", "trained on"),
}  # fmt: skip


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", tiny_models.model_folder("llama"))


def _folder(tmp_path: Path, adapter: Path) -> ModelFolder:
    return resolve(ModelSettings(name=str(tiny_models.model_folder("llama")), adapter=str(adapter)))


@pytest.mark.parametrize("mistake", MISTAKES)
def test_an_adapter_that_does_not_fit_is_refused_before_anything_starts(
    tmp_path: Path, adapter: Path, mistake: str
) -> None:
    change, where, fix = MISTAKES[mistake]
    change(adapter)  # type: ignore[no-untyped-call]
    job = job_of(tmp_path, model={"name": str(tiny_models.model_folder("llama")), "adapter": "adapter"})
    started = time.monotonic()
    refused("run", job, where=where, fix=fix)
    assert time.monotonic() - started < 30


def test_an_adapter_that_is_not_there_is_refused(tmp_path: Path) -> None:
    model = {"name": str(tiny_models.model_folder("llama")), "adapter": "./none"}
    refused("run", job_of(tmp_path, model=model), where="./none", fix="give an adapter's folder, a hub id")


def test_an_adapter_is_described_in_a_line(tmp_path: Path, adapter: Path) -> None:
    model = _folder(tmp_path, adapter)
    assert str(check_adapter(str(adapter), model)) == (
        "LoRA of rank 4 on 8 layers (down_proj, o_proj, q_proj, v_proj)"
    )


@pytest.mark.parametrize("name", sorted(tiny_models.CONFIGS.keys() - {"mamba"}))
def test_adapters_of_their_own_model_fit_however_it_names_its_weights(tmp_path: Path, name: str) -> None:
    """Some checkpoints name weights otherwise than the model its layers, and some keep them transposed."""
    model = tiny_models.model_folder(name)
    targets = ("q_proj", "down_proj", "c_attn", "c_proj", "fc1", "q", "wo")
    adapter = make_adapter(tmp_path / "adapter", model, targets)
    used = ("model.safetensors",)
    assert check_adapter(str(adapter), ModelFolder(str(model), str(model), used)).layers > 1


def test_all_bytes_of_an_adapter_are_in_the_fingerprint_and_nothing_of_its_place(
    tmp_path: Path, adapter: Path
) -> None:
    first = _folder(tmp_path, adapter).fingerprint
    (adapter / "README.md").write_text("not read by any loader")
    assert _folder(tmp_path, shutil.copytree(adapter, tmp_path / "copy")).fingerprint == first
    weights = adapter / "adapter_model.safetensors"
    changed = bytearray(weights.read_bytes())
    changed[-1] ^= 1
    weights.write_bytes(bytes(changed))
    second = _folder(tmp_path, adapter).fingerprint
    _config(lora_alpha=5)(adapter)
    third = _folder(tmp_path, adapter).fingerprint
    llama = str(tiny_models.model_folder("llama"))
    assert len({first, second, third, ModelFolder(llama, llama, ("config.json",)).fingerprint}) == 4


def test_names_and_bytes_of_rows_adapters_are_in_the_fingerprint_and_their_order_is_not(
    tmp_path: Path, adapter: Path
) -> None:
    other = make_adapter(tmp_path / "other", tiny_models.model_folder("llama"), seed=1)

    def of(**adapters: Path) -> str:
        places = {name: str(place) for name, place in adapters.items()}
        name = str(tiny_models.model_folder("llama"))
        return resolve(ModelSettings(name=name, adapters=places, adapter_column="which")).fingerprint

    prints = [of(a=adapter, b=other), of(a=other, b=adapter), of(a=adapter), of(c=adapter)]
    assert len(set(prints)) == 4
    assert of(b=other, a=adapter) == prints[0]


@pytest.mark.parametrize(
    ("keys", "where", "fix"),
    [
        ({"adapters": {"a": "adapter"}}, "adapters and adapter_column go together", "give both"),
        ({"adapter_column": "id"}, "adapters and adapter_column go together", "give both"),
        ({"adapters": {}, "adapter_column": "id"}, "adapters", "give at least one"),
        ({"adapter": "adapter", "adapters": {"a": "b"}, "adapter_column": "text"}, "model", "give adapter for all"),
        ({"adapters": {"a": "b"}, "adapter_column": "text", "quantization": "fp8"}, "quantization", "leave one out"),
        ({"adapters": {"a": "adapter"}, "adapter_column": "txt"}, "'txt'", "did you mean 'text'"),
        ({"adapters": {"a": "adapter", "b": "none/of/these"}, "adapter_column": "text"}, "none/of/these", "hub id"),
    ],
)  # fmt: skip
def test_adapters_of_rows_that_cannot_be_are_refused_before_anything_starts(
    tmp_path: Path, adapter: Path, keys: dict[str, Any], where: str, fix: str
) -> None:
    job = job_of(tmp_path, model={"name": str(tiny_models.model_folder("llama")), **keys})
    refused("run", job, where=where, fix=fix)
