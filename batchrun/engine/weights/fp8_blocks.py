"""Weights published in fp8 with a scale for each block of rows and columns, expanded one by one as they are read.

Whoever loads the model sees a checkpoint of plain weights: what becomes of experts, of an adapter, of a rank's part
and of `model.quantization` is then the same as with any other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from batchrun.engine.weights.packed_format import Blocks


class BlockWeight:
    """A weight in a file as a slice of numbers, as safetensors has them: their products with the scales of the blocks
    (of the last two dimensions) that they are in, float32."""

    def __init__(self, weight: Any, scale: Any, block: tuple[int, int], device: str) -> None:
        """Of two slices of files; expanded on the `device`, which makes less of them for the host to do."""
        self._weight, self._scale, self._block, self._device = weight, scale, block, device

    def get_shape(self) -> list[int]:
        """Of the weight."""
        shape: list[int] = self._weight.get_shape()
        return shape

    @property
    def shape(self) -> torch.Size:
        """Of the weight."""
        return torch.Size(self.get_shape())

    def get_dtype(self) -> str:
        """In safetensors' words."""
        return "F32"

    def __getitem__(self, places: Any) -> Tensor:
        """Those at `places`, as a tensor takes slices, of which one may stand for each of its dimensions.

        Raises:
            ValueError: the scales are not those of so many blocks.
        """
        numbers: Tensor = self._weight[places].to(self._device).float()
        scale: Tensor = self._scale[...].to(self._device).float()
        shape = self.get_shape()
        blocks = [-(-length // size) for length, size in zip(shape[-2:], self._block, strict=True)]
        if list(scale.shape) != [*shape[:-2], *blocks]:
            what = f"scales of {_size(scale.shape)} are not those of blocks of {_size(self._block)}"
            raise ValueError(f"{what} of a weight of {_size(shape)}")
        sizes = [1] * (len(shape) - 2) + list(self._block)
        for dim, (length, size) in enumerate(zip(shape, sizes, strict=True)):
            wanted = torch.arange(length, device=self._device)
            if isinstance(places, tuple) and dim < len(places):
                wanted = wanted[places[dim]]
            scale = scale.index_select(dim, wanted // size)
        return numbers.mul_(scale)


def expanding(tensors: Mapping[str, Any], blocks: Blocks, device: str) -> dict[str, Any]:
    """A checkpoint's slices by name, in which weights with scales take the place of both."""
    found = {name: held for name, held in tensors.items() if not name.endswith(blocks.suffix)}
    for name in blocks.weights(tensors):
        found[name] = BlockWeight(tensors[name], tensors[name + blocks.suffix], blocks.block, device)
    return found


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
