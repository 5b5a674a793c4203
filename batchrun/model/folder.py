"""A model reference to a local folder that is safe to load, and what its files say about it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from batchrun.engine.weights.lora_config import CONFIG, WEIGHTS
from batchrun.errors import ModelError
from batchrun.hashing import stable_hash
from batchrun.job.settings import ModelSettings
from batchrun.model.download import local_folder
from batchrun.model.files import ADAPTER, PICKLED, SAFE_WEIGHTS, chosen, read_json, used_files
from batchrun.model.fingerprint import fingerprint, in_background, sampled

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)

# Some configurations write "no limit" as a huge number.
_UNBOUNDED = 1 << 30


@dataclass(frozen=True)
class ModelFolder:
    """A model on the local disk, its tokenizer's folder, which may be the same, and those of LoRA adapters for it: one
    for all rows, or several with their names.

    `used` and `tokenizer_used` are the names of the files in them that loading reads.
    """

    path: str
    tokenizer_path: str
    used: tuple[str, ...] = ()
    tokenizer_used: tuple[str, ...] = ()
    adapter: str | None = None
    adapters: tuple[tuple[str, str], ...] = ()

    @property
    def all_adapters(self) -> list[str]:
        """The folders of adapters, whatever they are for."""
        return [*([] if self.adapter is None else [self.adapter]), *(folder for _, folder in self.adapters)]

    @cached_property
    def fingerprint(self) -> str:
        """A hex hash of all that the files of the model, its tokenizer and its adapters hold. Waits for
        `fingerprint_meanwhile`.

        Raises:
            ModelError: a file cannot be read.
        """
        try:
            return self._fingerprint.result()
        except OSError as error:
            raise ModelError(f"its files cannot be read ({error})", self.path, "restore them") from None

    def fingerprint_meanwhile(self) -> None:
        """Begins to hash the files, so that other work goes on while tens of gigabytes are read."""
        self._fingerprint  # noqa: B018

    @cached_property
    def _fingerprint(self) -> Future[str]:
        return in_background(lambda: self._joined(fingerprint(self.path, self.used), fingerprint))

    @cached_property
    def sampled_fingerprint(self) -> str:
        """The fingerprint that earlier versions pinned, which took samples of the weights only."""

        def of(path: str, names: Sequence[str]) -> str:
            return sampled(path, names, chosen(names, SAFE_WEIGHTS + PICKLED))

        return self._joined(of(self.path, self.used), of)

    def _joined(self, model: str, of: Callable[[str, Sequence[str]], str]) -> str:
        parts: list[Any] = [model]
        if self.tokenizer_path != self.path:
            parts.append(of(self.tokenizer_path, self.tokenizer_used))
        if self.adapter is not None:
            parts.append({"adapter": fingerprint(self.adapter, ADAPTER)})
        if self.adapters:
            parts.append({"adapters": {name: fingerprint(path, ADAPTER) for name, path in self.adapters}})
        return model if len(parts) == 1 else stable_hash(parts)


def resolve(settings: ModelSettings) -> ModelFolder:
    """Finds the model, its tokenizer and adapters, from the hub or an fsspec URL once into a cache, and looks at
    the files.

    Raises:
        ModelError: nothing is there; config.json or the weights are missing; it brings code of its own or
            pickled weights that the job does not allow.
    """
    path = local_folder(settings.name, settings, "model")
    tokenizer_path, adapter = path, None
    if settings.tokenizer is not None:
        tokenizer_path = local_folder(settings.tokenizer, settings, "tokenizer")
    if settings.adapter is not None:
        adapter = _adapter_folder(settings.adapter, settings)
    adapters = [(name, _adapter_folder(place, settings)) for name, place in (settings.adapters or {}).items()]
    _refuse_missing_config(path, settings)
    for folder in dict.fromkeys((path, tokenizer_path)):
        _refuse_remote_code(folder, settings)
    _refuse_pickle(path, settings)
    model = ModelFolder(
        path,
        tokenizer_path,
        tuple(used_files(os.listdir(path), settings, "model")),
        tuple(used_files(os.listdir(tokenizer_path), settings, "tokenizer")),
        adapter,
        tuple(adapters),
    )
    model.fingerprint_meanwhile()
    return model


def context_length(config: Any) -> int | None:
    """The most tokens, prompt and answer together, that a transformers configuration allows; None: any
    number."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in _CONTEXT_KEYS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            return value if value < _UNBOUNDED else None
    return None


def _adapter_folder(name: str, settings: ModelSettings) -> str:
    folder = local_folder(name, settings, "adapter")
    _refuse_incomplete_adapter(folder, name)
    return folder


def _refuse_missing_config(path: str, settings: ModelSettings) -> None:
    if not os.path.isfile(os.path.join(path, "config.json")):
        raise ModelError(
            "no config.json in the model's folder", settings.name, "give a folder in transformers' layout"
        )


def _refuse_incomplete_adapter(path: str, name: str) -> None:
    held = os.listdir(path) if os.path.isdir(path) else []
    fix = "give the folder that peft's save_pretrained wrote"
    if CONFIG not in held:
        raise ModelError(f"no {CONFIG} in the adapter's folder", name, fix)
    if WEIGHTS not in held:
        if pickled := ", ".join(sorted(chosen(held, PICKLED))):
            fix = "save the adapter again with peft, which writes safetensors"
            raise ModelError(f"its only weights are pickled, which can run code ({pickled})", name, fix)
        raise ModelError(f"no {WEIGHTS} in the adapter's folder", name, fix)


def _refuse_remote_code(path: str, settings: ModelSettings) -> None:
    if settings.trust_remote_code:
        return
    for name in ("config.json", "tokenizer_config.json"):
        if read_json(Path(path) / name).get("auto_map"):
            raise ModelError(
                f"{name} asks to run Python code that comes with the model (auto_map)",
                path,
                "read that code, then set model.trust_remote_code: true",
            )


def _refuse_pickle(path: str, settings: ModelSettings) -> None:
    names = os.listdir(path)
    if chosen(names, SAFE_WEIGHTS):
        return
    pickled = ", ".join(sorted(chosen(names, PICKLED)))
    if not pickled:
        what = "no *.safetensors weights in the model's folder"
        raise ModelError(what, settings.name, "copy the whole model into it")
    if not settings.allow_pickle:
        raise ModelError(
            f"its only weights are pickled, which can run code ({pickled})",
            settings.name,
            "convert them to safetensors, or set model.allow_pickle: true if you trust the source",
        )
