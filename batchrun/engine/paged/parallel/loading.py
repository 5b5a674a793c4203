"""A rank's share of a checkpoint, read slice by slice: what belongs to others is never in memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from batchrun.engine.paged.attention.architecture import Unsupported
from batchrun.engine.paged.parallel.sharding import Sharding, Share
from batchrun.engine.weights.fp8_blocks import expanding
from batchrun.engine.weights.packed_format import fp8_blocks, packed_format
from batchrun.engine.weights.tensor_files import open_tensors


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


def read_shares(folder: str, sharding: Sharding, device: str = "cpu") -> dict[str, Slice]:
    """The checkpoint in `folder`, as a rank on the `device` has it; no data is read yet. Packed weights are divided
    once they are expanded, one by one, and read whole; fp8 in blocks is expanded as the rank's part of it is read.

    Raises:
        Unsupported: it is not in safetensors.
    """
    wholes = open_tensors(folder)
    if not wholes:
        raise Unsupported("only safetensors can be read in parts, and there is no model.safetensors")
    settings = getattr(sharding.config, "quantization_config", None)
    form, blocks = packed_format(settings), fp8_blocks(settings)
    if blocks is not None:
        wholes = expanding(wholes, blocks, device)
    packed = {name for parts in form.parts(wholes).values() for name in parts.values()} if form else set()
    return {
        name: Slice(whole, Share() if name in packed else sharding.share(name, tuple(whole.get_shape())))
        for name, whole in wholes.items()
    }
