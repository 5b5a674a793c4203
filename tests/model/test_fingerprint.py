"""A model's fingerprint is of all its bytes, which are read once: what is known is taken from where it is known."""

from __future__ import annotations

import hashlib
import os
import threading
from dataclasses import replace
from pathlib import Path

import pytest
from test_model import WEIGHTS, settings_of, write_model

from batchrun.driver.prepare import compare, prepare
from batchrun.errors import ChangedError, ModelError
from batchrun.hashing import stable_hash
from batchrun.model import fingerprint
from batchrun.model.folder import resolve
from batchrun.output import identity, plans
from jobs import load, write_job


@pytest.fixture
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model written long ago, with a cache of its own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = write_model(tmp_path / "model")
    for file in folder.iterdir():
        os.utime(file, (1, 1))
    return folder


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that are hashed from now on."""
    names: list[str] = []
    real = hashlib.file_digest

    def file_digest(stream: object, name: str) -> object:
        names.append(Path(stream.name).name)  # type: ignore[attr-defined]
        return real(stream, name)  # type: ignore[arg-type]

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", file_digest)
    return names


@pytest.mark.parametrize("place", [0, 100_000, len(WEIGHTS) // 2 + 70_001, len(WEIGHTS) - 1])
def test_the_fingerprint_sees_every_byte_of_the_weights(model: Path, place: int) -> None:
    before = resolve(settings_of(model)).fingerprint
    data = bytearray(WEIGHTS)
    data[place] ^= 1
    (model / "model.safetensors").write_bytes(data)
    assert resolve(settings_of(model)).fingerprint != before


def test_weights_are_hashed_once_until_size_or_time_changes(model: Path, hashed: list[str]) -> None:
    weights = model / "model.safetensors"
    first = resolve(settings_of(model)).fingerprint
    assert hashed.count("model.safetensors") == 1
    assert resolve(settings_of(model)).fingerprint == first
    assert hashed.count("model.safetensors") == 1
    os.utime(weights, ns=(1, 2_000_000_001))
    assert resolve(settings_of(model)).fingerprint == first
    assert hashed.count("model.safetensors") == 2
    weights.write_bytes(WEIGHTS + b"x")
    assert resolve(settings_of(model)).fingerprint != first


def test_weights_written_just_now_are_hashed_again(model: Path, hashed: list[str]) -> None:
    (model / "model.safetensors").touch()
    for _ in range(2):
        assert resolve(settings_of(model)).fingerprint
    assert hashed.count("model.safetensors") == 2


def test_a_damaged_or_missing_cache_costs_time_and_nothing_else(
    model: Path, hashed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = resolve(settings_of(model)).fingerprint
    kept = next((tmp_path / "cache/batchrun/digests").iterdir())
    for text in ("", "[]", '{"file": 1}'):
        kept.write_text(text)
        assert resolve(settings_of(model)).fingerprint == first
    (tmp_path / "no-folder").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "no-folder"))
    assert resolve(settings_of(model)).fingerprint == first
    assert hashed.count("model.safetensors") == 5


def test_the_hubs_own_digest_of_weights_is_taken_and_is_that_of_a_plain_folder(
    model: Path, hashed: list[str], tmp_path: Path
) -> None:
    cached = tmp_path / "hub/snapshots/abc"
    cached.mkdir(parents=True)
    (tmp_path / "hub/blobs").mkdir()
    for file in model.iterdir():
        data = file.read_bytes()
        large = file.name == "model.safetensors"
        name = (hashlib.sha256 if large else hashlib.sha1)(data).hexdigest()
        (tmp_path / "hub/blobs" / name).write_bytes(data)
        (cached / file.name).symlink_to(tmp_path / "hub/blobs" / name)
    found = resolve(settings_of(cached)).fingerprint
    assert hashlib.sha256(WEIGHTS).hexdigest() not in hashed
    assert resolve(settings_of(model)).fingerprint == found


def test_nobody_waits_for_the_hash_before_it_is_asked_for(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    go = threading.Event()
    real = hashlib.file_digest

    def slow(stream: object, name: str) -> object:
        assert go.wait(30)
        return real(stream, name)  # type: ignore[arg-type]

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", slow)
    found = resolve(settings_of(model))
    threads = [thread for thread in threading.enumerate() if thread.name == "batchrun-fingerprint"]
    assert threads, "it has begun"
    assert all(thread.daemon for thread in threads), "and no command waits for it at its end"
    go.set()
    assert len(found.fingerprint) == 64


def test_weights_that_cannot_be_read_are_the_models_error(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(stream: object, name: str) -> object:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(fingerprint.hashlib, "file_digest", broken)
    with pytest.raises(ModelError, match="its files cannot be read"):
        resolve(settings_of(model)).fingerprint  # noqa: B018


def test_an_output_that_pinned_samples_of_the_weights_goes_on(tmp_path: Path, tiny_llama: Path) -> None:
    job = load(write_job(tmp_path, tiny_llama))
    fresh = prepare(job)
    sampled = fresh.model.sampled_fingerprint
    assert sampled != fresh.model.fingerprint
    earlier = replace(
        fresh.identity, model_fingerprint=sampled, job_hash=stable_hash([job.deciding(), sampled])
    )
    plans.add(fresh.folder, [fresh.plan], 0)
    identity.pin(fresh.folder, earlier)
    again = prepare(job)
    assert again.identity.job_hash == earlier.job_hash
    compare(again, again.pinned)
    other = load(tmp_path / "job.yaml", "generation.seed=3")
    with pytest.raises(ChangedError, match=r"generation\.seed: 0 -> 3"):
        compare(prepare(other), earlier)
