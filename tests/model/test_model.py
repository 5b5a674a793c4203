"""A model is found, fingerprinted by what it holds, and refused where loading it would run code."""

from __future__ import annotations

import json
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from huggingface_hub.errors import LocalEntryNotFoundError
from tiny import byte_tokenizer
from transformers import GPT2Config, LlamaConfig, MambaConfig

from batchrun.errors import ModelError
from batchrun.job.settings import ModelSettings
from batchrun.model.folder import context_length, resolve
from batchrun.model.tokenizer import load_tokenizer, stop_token_ids

WEIGHTS = bytes(range(256)) * (5 << 12)  # 5 MiB: more than is hashed whole


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def write_model(folder: Path, weights: str = "model.safetensors", **config: Any) -> Path:
    folder.mkdir(parents=True)
    byte_tokenizer(eos_token="</s>").save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "eos_token_id": 1, **config}))
    (folder / weights).write_bytes(WEIGHTS)
    return folder


def settings_of(folder: Any, **how: Any) -> ModelSettings:
    return ModelSettings(name=str(folder), **how)


def test_the_fingerprint_is_the_same_wherever_the_folder_lies(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "elsewhere" / "copy")
    (copy / "README.md").write_text("not read by any loader")
    (copy / "checkpoint-10").mkdir()
    here, there = resolve(settings_of(model)), resolve(settings_of(f"file://{copy}"))
    assert (here.path, there.path) == (str(model), str(copy))
    assert here.fingerprint == there.fingerprint


@pytest.mark.parametrize("place", [0, len(WEIGHTS) // 63 * 30 + 5, len(WEIGHTS) - 1])
def test_the_fingerprint_sees_the_ends_and_the_middle_of_the_weights(model: Path, place: int) -> None:
    before = resolve(settings_of(model)).fingerprint
    data = bytearray(WEIGHTS)
    data[place] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert resolve(settings_of(model)).fingerprint != before


def test_the_fingerprint_sees_every_small_file_and_another_tokenizer(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    prints = {
        resolve(settings_of(model)).fingerprint,
        resolve(settings_of(model, tokenizer=str(other))).fingerprint,
    }
    assert resolve(settings_of(model, tokenizer=str(other))).tokenizer_path == str(other)
    (other / "special_tokens_map.json").write_text("{}")
    prints.add(resolve(settings_of(model, tokenizer=str(other))).fingerprint)
    (model / "generation_config.json").write_text("{}")
    prints.add(resolve(settings_of(model)).fingerprint)
    (model / "model.safetensors").write_bytes(WEIGHTS + b"x")
    prints.add(resolve(settings_of(model)).fingerprint)
    assert len(prints) == 5


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json"])
def test_code_that_comes_with_a_model_is_refused_unless_the_job_says_so(model: Path, name: str) -> None:
    config = json.loads((model / name).read_text())
    (model / name).write_text(json.dumps({**config, "auto_map": {"AutoConfig": "own.Config"}}))
    with pytest.raises(
        ModelError, match=rf"{name} asks to run Python code.*set model\.trust_remote_code: true"
    ):
        resolve(settings_of(model))
    trusted = resolve(settings_of(model, trust_remote_code=True)).fingerprint
    (model / "own.py").write_text("print('hello')")
    assert resolve(settings_of(model, trust_remote_code=True)).fingerprint != trusted


def test_code_that_comes_with_a_tokenizer_is_refused_as_well(model: Path, tmp_path: Path) -> None:
    other = write_model(tmp_path / "other")
    (other / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["own.T", null]}}')
    with pytest.raises(ModelError, match=r"tokenizer_config\.json asks to run"):
        resolve(settings_of(model, tokenizer=str(other)))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt"])
def test_pickled_weights_are_refused_unless_the_job_says_so(tmp_path: Path, name: str) -> None:
    model = write_model(tmp_path / "pickled", weights=name)
    with pytest.raises(ModelError, match=rf"pickled, which can run code \({name}\); .*model\.allow_pickle"):
        resolve(settings_of(model))
    assert resolve(settings_of(model, allow_pickle=True)).path == str(model)
    (model / "model.safetensors").write_bytes(WEIGHTS)
    assert resolve(settings_of(model)).path == str(model)


def test_a_folder_that_is_no_model_is_told_apart_from_a_missing_one(model: Path, tmp_path: Path) -> None:
    (model / "config.json").rename(model / "config.txt")
    with pytest.raises(ModelError, match=r"no config\.json"):
        resolve(settings_of(model))
    for name in (tmp_path / "nowhere", "./nowhere", "a/b/c"):
        with pytest.raises(ModelError, match="no such folder"):
            resolve(settings_of(name))
    shutil.copytree(model, tmp_path / "weightless")
    (tmp_path / "weightless" / "model.safetensors").unlink()
    (tmp_path / "weightless" / "config.json").write_text("{}")
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights"):
        resolve(settings_of(tmp_path / "weightless"))


def test_a_hub_that_cannot_be_reached_is_told_with_its_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*_: Any, **__: Any) -> str:
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    with pytest.raises(
        ModelError, match=r"org/name: no such local folder.*cannot be reached; download it beforehand"
    ):
        resolve(settings_of("org/name"))
    monkeypatch.undo()
    with pytest.raises(ModelError, match="no hub id"):
        resolve(settings_of("not a hub id!"))


@pytest.mark.parametrize("pickled", [False, True])
def test_only_what_is_safe_is_asked_of_the_hub(
    model: Path, monkeypatch: pytest.MonkeyPatch, pickled: bool
) -> None:
    asked: list[tuple[str, str | None, list[str]]] = []

    def snapshot(
        name: str, revision: str | None, allow_patterns: list[str], ignore_patterns: list[str]
    ) -> str:
        asked.append((name, revision, allow_patterns))
        return str(model)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert resolve(settings_of("org/name", revision="abc", allow_pickle=pickled)).path == str(model)
    assert [(name, revision) for name, revision, _ in asked] == [("org/name", "abc")]
    assert not {"*.py", "*.bin", "*.pt"} & set(asked[0][2])


def test_a_model_behind_a_url_is_downloaded_once_and_whole(model: Path, tmp_path: Path) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(model) + "/", "/models/tiny/", recursive=True)
    fs.pipe("/models/tiny/evil.bin", b"pickle")
    first = resolve(settings_of("memory://models/tiny"))
    assert first.fingerprint == resolve(settings_of(model)).fingerprint
    assert not (Path(first.path) / "evil.bin").exists()
    assert resolve(settings_of("memory://models/tiny/")) == first
    fs.pipe("/models/tiny/generation_config.json", b"{}")
    changed = resolve(settings_of("memory://models/tiny"))
    assert changed.path != first.path
    assert changed.fingerprint != first.fingerprint
    with pytest.raises(ModelError, match="no model's folder is there"):
        resolve(settings_of("memory://models/nothing"))


def test_several_at_once_download_one_copy_without_a_trace_of_the_others(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(model) + "/", "/models/shared/", recursive=True)
    together, one, get_file = threading.Barrier(3), threading.Lock(), MemoryFileSystem.get_file

    def get_together(self: Any, source: str, *rest: Any) -> None:
        if source.endswith("/config.json"):
            together.wait(30)  # all of them have seen that there is no copy yet
        with one:  # readers of one file in memory share its position
            get_file(self, source, *rest)

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_together)
    with ThreadPoolExecutor(3) as pool:
        found = set(pool.map(resolve, [settings_of("memory://models/shared")] * 3))
    cache = tmp_path / "cache" / "batchrun" / "models"
    assert [str(p) for p in cache.iterdir()] == [folder.path for folder in found]


def test_a_download_that_arrives_short_is_no_model(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec.filesystem("memory").put(str(model) + "/", "/models/short/", recursive=True)
    monkeypatch.setattr(
        MemoryFileSystem, "get_file", lambda self, source, target: Path(target).write_bytes(b"{}")
    )
    with pytest.raises(ModelError, match=r"arrived with 2 of \d+ bytes"):
        resolve(settings_of("memory://models/short"))


def test_a_download_that_breaks_off_leaves_nothing_behind(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fs = fsspec.filesystem("memory")
    fs.put(str(model) + "/", "/models/broken/", recursive=True)

    def fail(self: Any, source: str, target: str) -> None:
        Path(target).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "get_file", fail)
        with pytest.raises(ModelError, match=r"cannot be downloaded .*No space left"):
            resolve(settings_of("memory://models/broken"))
    assert list((tmp_path / "cache" / "batchrun" / "models").iterdir()) == []
    assert (
        resolve(settings_of("memory://models/broken")).fingerprint == resolve(settings_of(model)).fingerprint
    )


def test_the_tokenizer_loads_from_the_folder_or_says_why_not(model: Path) -> None:
    settings = settings_of(model)
    folder = resolve(settings)
    assert (
        load_tokenizer(folder, settings)("a", add_special_tokens=False).input_ids
        == byte_tokenizer()("a").input_ids[1:]
    )
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (model / name).unlink()
    with pytest.raises(ModelError, match=r"the folder has no tokenizer.*set model\.tokenizer"):
        load_tokenizer(folder, settings)


def test_stop_tokens_are_those_of_generation_config_config_and_tokenizer(model: Path) -> None:
    settings = settings_of(model)
    folder = resolve(settings)
    tokenizer = load_tokenizer(folder, settings)
    assert stop_token_ids(folder, tokenizer) == (1,)
    (model / "generation_config.json").write_text('{"eos_token_id": [3, 1]}')
    assert stop_token_ids(folder, tokenizer) == (1, 3)
    (model / "config.json").write_text('{"text_config": {"eos_token_id": 2}, "eos_token_id": null}')
    (model / "generation_config.json").unlink()
    assert stop_token_ids(folder, byte_tokenizer()) == (2,)
    (model / "config.json").write_text("{}")
    assert stop_token_ids(folder, byte_tokenizer()) == ()


def test_the_context_is_read_under_all_its_names() -> None:
    assert context_length(LlamaConfig(max_position_embeddings=777)) == 777
    assert context_length(GPT2Config(n_positions=99)) == 99
    assert context_length(MambaConfig()) is None
    assert context_length(SimpleNamespace(max_seq_len=2048)) == 2048
    assert context_length(SimpleNamespace(max_position_embeddings=10**30)) is None


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_model_folder_without_a_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    folder = write_model(tmp_path / kind, model_type=kind)
    for file in folder.glob("tokenizer*"):
        file.unlink()
    with pytest.raises(ModelError, match=r"tokenizer"):
        load_tokenizer(resolve(settings_of(folder)), settings_of(folder))
