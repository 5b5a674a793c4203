"""A rank's share of a checkpoint, read slice by slice: what belongs to others is never in memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from batchrun.engine.paged.architecture import Unsupported
from batchrun.engine.paged.parallel.sharding import Sharding, Share


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
        share = self._share
        if share.blank:
            return torch.zeros_like(self._whole[...])
        if not share.begins:
            tensor: Tensor = self._whole[...]
            return tensor
        ahead = (slice(None),) * share.dim
        parts = [self._whole[(*ahead, slice(begin, begin + share.length))] for begin in share.begins]
        return parts[0] if len(parts) == 1 else torch.cat(parts, share.dim)


def read_shares(folder: str, sharding: Sharding) -> dict[str, Slice]:
    """The checkpoint in `folder`, as a rank has it; no data is read yet.

    Raises:
        Unsupported: it is in a format that is read whole.
    """
    shares: dict[str, Slice] = {}
    for file in _files(Path(folder)):
        opened: Any = safe_open(file, framework="pt", device="cpu")
        for name in opened.keys():  # noqa: SIM118
            if name.endswith("weight_scale_inv"):
                raise Unsupported("fp8 weights with a scale for each block are not divided over GPUs")
            whole = opened.get_slice(name)
            if whole.get_dtype() in ("I8", "U8", "I32"):
                raise Unsupported("weights that are expanded while loading are not divided over GPUs")
            shares[name] = Slice(whole, sharding.share(name, tuple(whole.get_shape())))
    return shares


def _files(folder: Path) -> list[Path]:
    """Those that transformers would read: some folders have the weights twice, in another layout."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        return [folder / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    if (folder / "model.safetensors").exists():
        return [folder / "model.safetensors"]
    raise Unsupported("only safetensors can be read in parts, and there is no model.safetensors")
