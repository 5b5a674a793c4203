"""A model reference to a local folder that is safe to load, and what its files say about it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import fsspec

from batchrun.dataset.location import version_of
from batchrun.engine.lora_config import CONFIG, WEIGHTS
from batchrun.errors import ModelError, first_line, one_line
from batchrun.hashing import stable_hash
from batchrun.job.settings import ModelSettings
from batchrun.model.fingerprint import cache_folder, fingerprint, in_background, sampled
from batchrun.model.light import import_tokenizers, without_warnings
from batchrun.storage import deadline

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_SAFE_WEIGHTS = ("*.safetensors",)
_PLAIN = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_CODE = ("*.py",)
_ADAPTER = (CONFIG, WEIGHTS)
# One of these has every tokenizer.
_VOCABULARIES = (
    "*.tiktoken",
    "*.model",
    "merges.txt",
    "tekken.json",
    "tokenization*.py",
    "tokenizer.json",
    "vocab*",
)

_CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "max_sequence_length",
    "max_seq_len",
    "seq_length",
    "n_ctx",
)
# What a folder is read for.
Part = Literal["model", "tokenizer", "adapter"]

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
            return sampled(path, names, _chosen(names, _SAFE_WEIGHTS + _PICKLED))

        return self._joined(of(self.path, self.used), of)

    def _joined(self, model: str, of: Callable[[str, Sequence[str]], str]) -> str:
        parts: list[Any] = [model]
        if self.tokenizer_path != self.path:
            parts.append(of(self.tokenizer_path, self.tokenizer_used))
        if self.adapter is not None:
            parts.append({"adapter": fingerprint(self.adapter, _ADAPTER)})
        if self.adapters:
            parts.append({"adapters": {name: fingerprint(path, _ADAPTER) for name, path in self.adapters}})
        return model if len(parts) == 1 else stable_hash(parts)


def resolve(settings: ModelSettings) -> ModelFolder:
    """Finds the model, its tokenizer and adapters, from the hub or an fsspec URL once into a cache, and looks at
    the files.

    Raises:
        ModelError: nothing is there; config.json or the weights are missing; it brings code of its own or
            pickled weights that the job does not allow.
    """
    path = _local_folder(settings.name, settings, "model")
    tokenizer_path, adapter = path, None
    if settings.tokenizer is not None:
        tokenizer_path = _local_folder(settings.tokenizer, settings, "tokenizer")
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
        tuple(_used_files(os.listdir(path), settings, "model")),
        tuple(_used_files(os.listdir(tokenizer_path), settings, "tokenizer")),
        adapter,
        tuple(adapters),
    )
    model.fingerprint_meanwhile()
    return model


def load_tokenizer(folder: ModelFolder, settings: ModelSettings) -> PreTrainedTokenizerBase:
    """The folder's tokenizer, without a word to the network.

    Raises:
        ModelError: there is none, it has no vocabulary, or transformers cannot load it.
    """
    import_tokenizers(with_torch=settings.trust_remote_code)
    from transformers import AutoTokenizer

    try:
        with without_warnings():
            tokenizer = AutoTokenizer.from_pretrained(
                folder.tokenizer_path, trust_remote_code=settings.trust_remote_code, local_files_only=True
            )
        # Of a folder without one, transformers makes an empty tokenizer: no text would have any token.
        found = not set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens)
    except Exception as error:  # whatever a tokenizer's files make transformers and its helpers raise
        if _chosen(os.listdir(folder.tokenizer_path), _VOCABULARIES):
            raise ModelError(
                f"its tokenizer cannot be loaded ({first_line(error)})",
                folder.tokenizer_path,
                "restore its files, or set model.tokenizer to another folder",
            ) from None
        found = False
    if not found:
        raise ModelError(
            "the folder has no tokenizer",
            folder.tokenizer_path,
            "add its tokenizer.json, or set model.tokenizer to another folder",
        )
    return tokenizer


def context_length(config: Any) -> int | None:
    """The most tokens, prompt and answer together, that a transformers configuration allows; None: any
    number."""
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for key in _CONTEXT_KEYS:
        value = getattr(text, key, None)
        if isinstance(value, int) and value > 0:
            return value if value < _UNBOUNDED else None
    return None


def stop_token_ids(folder: ModelFolder, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that end an answer, ascending: those of generation_config.json, config.json and the
    tokenizer."""
    config = _read_json(Path(folder.path) / "config.json")
    sources = (
        _read_json(Path(folder.path) / "generation_config.json").get("eos_token_id"),
        config.get("eos_token_id"),
        (config.get("text_config") or {}).get("eos_token_id"),
        tokenizer.eos_token_id,
    )
    ids: set[int] = set()
    for source in sources:
        ids.update(source if isinstance(source, list) else [source] if source is not None else [])
    return tuple(sorted(ids))


def _local_folder(name: str, settings: ModelSettings, part: Part) -> str:
    local = os.path.expanduser(name.removeprefix("file://"))
    if os.path.isdir(local):
        return os.path.abspath(local)
    if "://" in name and not name.startswith("file://"):
        return _downloaded(name, settings, part)
    if name.startswith((".", "~")) or os.path.isabs(local) or name.count("/") > 1:
        what = "a file, not a model's folder" if os.path.isfile(local) else "no such folder"
        raise ModelError(what, name, "give a model's folder, a hub id, or an fsspec URL")
    return _from_hub(name, settings, part)


def _adapter_folder(name: str, settings: ModelSettings) -> str:
    folder = _local_folder(name, settings, "adapter")
    _refuse_incomplete_adapter(folder, name)
    return folder


def _from_hub(name: str, settings: ModelSettings, part: Part) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = _patterns(settings, part)
    # The model's revision says nothing about a tokenizer from another repository.
    revision = settings.revision if name == settings.name else None

    def snapshot(patterns: Sequence[str]) -> str:
        # Folders inside a repository hold other formats and checkpoints of the same weights.
        return snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )

    try:
        path = snapshot(patterns)
        if part == "model" and settings.allow_pickle and not _chosen(os.listdir(path), _SAFE_WEIGHTS):
            snapshot(_PICKLED)
    except LocalEntryNotFoundError:
        raise ModelError(
            "no such local folder, not in the local cache, and the hub cannot be reached",
            name,
            "download it beforehand (hf download) or give a folder or an fsspec URL",
        ) from None
    except HFValidationError:
        raise ModelError(
            "no such folder, and no hub id", name, "give a folder, a hub id, or an fsspec URL"
        ) from None
    except (HfHubHTTPError, OSError) as error:
        raise ModelError(
            f"is not available from the hub ({one_line(error)})",
            name,
            "check name, revision and HF_TOKEN",
        ) from None
    return path


def _downloaded(url: str, settings: ModelSettings, part: Part) -> str:
    """The local copy of a folder behind an fsspec URL, named after its listing: a changed folder is another
    copy.

    A copy appears under its name by one rename of a complete folder, so any number of processes may try at
    once.
    """
    try:
        fs, root = fsspec.url_to_fs(url, **settings.storage_options)
        fs.invalidate_cache(root)
        listing = deadline.within(
            deadline.UNSIZED,
            lambda: _listing(fs, root, settings, part) if fs.isdir(root) else {},
        )
    except Exception as error:  # every store's client has errors of its own
        raise ModelError(
            f"cannot be listed ({type(error).__name__}: {error})", url, "check path and access"
        ) from None
    if not listing:
        what, file = ("adapter", CONFIG) if part == "adapter" else ("model", "config.json")
        raise ModelError(f"no {what}'s folder is there", url, f"give the URL of a folder with {file} in it")
    versions = [[name, info["size"], version_of(info)] for name, info in listing.items()]
    cache = cache_folder() / "models"
    target = cache / stable_hash([url.rstrip("/"), versions])[:32]
    if target.is_dir():
        return str(target)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".", dir=cache, ignore_cleanup_errors=True) as made:
        copy = Path(made) / "model"
        copy.mkdir()
        try:
            for name, info in listing.items():
                source, target_file = f"{root.rstrip('/')}/{name}", str(copy / name)
                deadline.within(deadline.sized(info["size"]), partial(fs.get_file, source, target_file))
                if (size := (copy / name).stat().st_size) != info["size"]:
                    raise OSError(f"{name} arrived with {size} of {info['size']} bytes")
            copy.rename(target)
        except Exception as error:  # every store's client has errors of its own
            # Another process was first: a rename never replaces a folder with files in it.
            if not target.is_dir():
                reason = f"{type(error).__name__}: {error}"
                raise ModelError(
                    f"cannot be downloaded ({reason})", url, "check access and disk space"
                ) from None
    return str(target)


def _listing(
    fs: fsspec.AbstractFileSystem, root: str, settings: ModelSettings, part: Part
) -> dict[str, Mapping[str, Any]]:
    entries = {info["name"].rstrip("/").rpartition("/")[2]: info for info in fs.ls(root, detail=True)}
    files = {name: info for name, info in entries.items() if info["type"] == "file"}
    return {name: files[name] for name in _used_files(list(files), settings, part)}


def _used_files(names: Sequence[str], settings: ModelSettings, part: Part) -> list[str]:
    """Those of a folder's files that loading reads, sorted; pickled weights only where there are no safe
    ones."""
    patterns = _patterns(settings, part)
    if part == "model" and settings.allow_pickle and not _chosen(names, _SAFE_WEIGHTS):
        patterns += _PICKLED
    return sorted(_chosen(names, patterns))


def _patterns(settings: ModelSettings, part: Part) -> tuple[str, ...]:
    if part == "adapter":
        return _ADAPTER
    weights = _SAFE_WEIGHTS if part == "model" else ()
    return _PLAIN + weights + (_CODE if settings.trust_remote_code else ())


def _chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    return [name for name in names if not name.startswith(".") and any(fnmatch(name, p) for p in patterns)]


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
        if pickled := ", ".join(sorted(_chosen(held, _PICKLED))):
            fix = "save the adapter again with peft, which writes safetensors"
            raise ModelError(f"its only weights are pickled, which can run code ({pickled})", name, fix)
        raise ModelError(f"no {WEIGHTS} in the adapter's folder", name, fix)


def _refuse_remote_code(path: str, settings: ModelSettings) -> None:
    if settings.trust_remote_code:
        return
    for name in ("config.json", "tokenizer_config.json"):
        if _read_json(Path(path) / name).get("auto_map"):
            raise ModelError(
                f"{name} asks to run Python code that comes with the model (auto_map)",
                path,
                "read that code, then set model.trust_remote_code: true",
            )


def _refuse_pickle(path: str, settings: ModelSettings) -> None:
    names = os.listdir(path)
    if _chosen(names, _SAFE_WEIGHTS):
        return
    pickled = ", ".join(sorted(_chosen(names, _PICKLED)))
    if not pickled:
        what = "no *.safetensors weights in the model's folder"
        raise ModelError(what, settings.name, "copy the whole model into it")
    if not settings.allow_pickle:
        raise ModelError(
            f"its only weights are pickled, which can run code ({pickled})",
            settings.name,
            "convert them to safetensors, or set model.allow_pickle: true if you trust the source",
        )


def _read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, empty where there is no file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"not readable as JSON ({error})", str(path), "restore the file") from None
    if not isinstance(value, dict):
        raise ModelError("not a JSON object", str(path), "restore the file")
    return value
