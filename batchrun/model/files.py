"""Which files of a model's, a tokenizer's or an adapter's folder loading reads, and which of them can run code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, Literal

from batchrun.engine.weights.lora_config import CONFIG, WEIGHTS
from batchrun.errors import ModelError
from batchrun.job.settings import ModelSettings

SAFE_WEIGHTS = ("*.safetensors",)
PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
ADAPTER = (CONFIG, WEIGHTS)
_PLAIN = ("*.json", "*.txt", "*.model", "*.tiktoken", "*.jinja")
_CODE = ("*.py",)

# What a folder is read for.
Part = Literal["model", "tokenizer", "adapter"]


def used_files(names: Sequence[str], settings: ModelSettings, part: Part) -> list[str]:
    """Those of a folder's files that loading reads, sorted; pickled weights only where there are no safe ones."""
    patterns = patterns_of(settings, part)
    if part == "model" and settings.allow_pickle and not chosen(names, SAFE_WEIGHTS):
        patterns += PICKLED
    return sorted(chosen(names, patterns))


def patterns_of(settings: ModelSettings, part: Part) -> tuple[str, ...]:
    """Of the files that loading reads, without pickled weights."""
    if part == "adapter":
        return ADAPTER
    weights = SAFE_WEIGHTS if part == "model" else ()
    return _PLAIN + weights + (_CODE if settings.trust_remote_code else ())


def chosen(names: Sequence[str], patterns: Sequence[str]) -> list[str]:
    """The names that one of the patterns fits, hidden files aside."""
    return [name for name in names if not name.startswith(".") and any(fnmatch(name, p) for p in patterns)]


def read_json(path: Path) -> dict[str, Any]:
    """The mapping in a JSON file, empty where there is no file.

    Raises:
        ModelError: it is not readable, or no mapping.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise ModelError(f"not readable as JSON ({error})", str(path), "restore the file") from None
    if not isinstance(value, dict):
        raise ModelError("not a JSON object", str(path), "restore the file")
    return value
