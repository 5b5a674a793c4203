"""A rank's share of a checkpoint, read slice by slice: what belongs to others is never in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from batchrun.engine.paged.attention.architecture import Unsupported
from batchrun.engine.paged.parallel.sharding import Sharding, Share
from batchrun.engine.weights.packed_format import packed_format


class Slice:
    """A rank's part of a tensor in a file, read when transformers asks for its data."""

    def __init__(self, whole: Any, share: Share) -> None:
        self._whole, self._share = whole, share
        self._shape = list(whole.get_shape())
        if share.begins:
            self._shape[share.dim] = share.length * len(share.begins)

    def get_shape(self) -> list[int]:
        """Of the part."""
        return self._shape

    @property
    def shape(self) -> torch.Size:
        """Of the part."""
        return torch.Size(self._shape)

    def get_dtype(self) -> str:
        """In safetensors' words."""
        dtype: str = self._whole.get_dtype()
        return dtype

    def __getitem__(self, _: Any) -> Tensor:
        return self._share.of(self._whole)


def read_shares(folder: str, sharding: Sharding) -> dict[str, Slice]:
    """The checkpoint in `folder`, as a rank has it; no data is read yet. Packed weights are divided once they are
    expanded, one by one, and read whole.

    Raises:
        Unsupported: it is not in safetensors, or in blocks that cannot be divided.
    """
    wholes: dict[str, Any] = {}
    for file in _files(Path(folder)):
        opened: Any = safe_open(file, framework="pt", device="cpu")
        wholes |= {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
    form = packed_format(getattr(sharding.config, "quantization_config", None))
    packed = {name for parts in form.parts(wholes).values() for name in parts.values()} if form else set()
    return {
        name: Slice(whole, Share() if name in packed else sharding.share(name, tuple(whole.get_shape())))
        for name, whole in wholes.items()
    }


def _files(folder: Path) -> list[Path]:
    """Those that transformers would read: some folders have the weights twice, in another layout."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise Unsupported("only safetensors can be read in parts, and there is no model.safetensors")
