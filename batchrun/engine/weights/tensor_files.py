"""A checkpoint's safetensors as slices, which are read when somebody asks for their data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open


def open_tensors(folder: str) -> dict[str, Any]:
    """Slices of the tensors in the checkpoint's safetensors by name; none where it has no such files."""
    found: dict[str, Any] = {}
    for file in _files(Path(folder)):
        opened: Any = safe_open(file, framework="pt", device="cpu")
        found |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    return found


def _files(folder: Path) -> list[Path]:
    """Those that transformers would read: some folders have the weights twice, in another layout."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    file = folder / "model.safetensors"
    return [file] if file.exists() else []
