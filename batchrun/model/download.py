"""The local folder of a reference: the folder itself, or a copy from the hub or from behind an fsspec URL."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import fsspec

from batchrun.dataset.location import version_of
from batchrun.engine.weights.lora_config import CONFIG
from batchrun.errors import ModelError, one_line
from batchrun.hashing import stable_hash
from batchrun.job.settings import ModelSettings
from batchrun.model.files import PICKLED, SAFE_WEIGHTS, Part, chosen, patterns_of, used_files
from batchrun.model.fingerprint import cache_folder
from batchrun.storage import deadline


def local_folder(name: str, settings: ModelSettings, part: Part) -> str:
    """Absolute path of what `name` refers to: a local folder, an fsspec URL or a hub id. Copies are made once.

    Raises:
        ModelError: nothing is there, or it cannot be reached.
    """
    local = os.path.expanduser(name.removeprefix("file://"))
    if os.path.isdir(local):
        return os.path.abspath(local)
    if "://" in name and not name.startswith("file://"):
        return _downloaded(name, settings, part)
    if name.startswith((".", "~")) or os.path.isabs(local) or name.count("/") > 1:
        folder = f"{'an' if part == 'adapter' else 'a'} {part}'s folder"
        what = f"a file, not {folder}" if os.path.isfile(local) else "no such folder"
        raise ModelError(what, name, f"give {folder}, a hub id, or an fsspec URL")
    return _from_hub(name, settings, part)


def _from_hub(name: str, settings: ModelSettings, part: Part) -> str:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    patterns = patterns_of(settings, part)
    # The model's revision says nothing about a tokenizer from another repository.
    revision = settings.revision if name == settings.name else None

    def snapshot(patterns: Sequence[str]) -> str:
        # Folders inside a repository hold other formats and checkpoints of the same weights.
        return snapshot_download(
            name, revision=revision, allow_patterns=list(patterns), ignore_patterns=["*/*"]
        )

    try:
        path = snapshot(patterns)
        if part == "model" and settings.allow_pickle and not chosen(os.listdir(path), SAFE_WEIGHTS):
            snapshot(PICKLED)
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
    """The local copy of a folder behind an fsspec URL, named after its listing: a changed folder is another copy.

    A copy appears under its name by one rename of a complete folder, so any number of processes may try at once.
    """
    try:
        fs, root = fsspec.url_to_fs(url, **settings.storage_options)
        fs.invalidate_cache(root)
        listing = deadline.within(
            deadline.UNSIZED,
            lambda: _listing(fs, root, settings, part) if fs.isdir(root) else {},
        )
    except Exception as error:
        # Every store's client has errors of its own.
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
        except Exception as error:
            # Every store's client has errors of its own.
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
    return {name: files[name] for name in used_files(list(files), settings, part)}
