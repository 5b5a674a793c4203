"""Checkpoints that are published in fp8: which of their layers are, and how those are scaled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from batchrun.engine.layers.fp8 import FP8, Fp8Linear
from batchrun.engine.weights.lora import Merge
from batchrun.engine.weights.packed_format import channels_and_tokens


@dataclass(frozen=True, slots=True)
class Fp8Checkpoint:
    """The layers in fp8 by name. `block` are rows and columns of a weight that share a scale; None where each row has
    one, which is the format that our products take."""

    layers: tuple[str, ...]
    block: tuple[int, int] | None

    @property
    def scale(self) -> str:
        """What the checkpoint calls a layer's scales."""
        return "weight_scale_inv" if self.block else "weight_scale"


def fp8_checkpoint(folder: str, config: Any) -> Fp8Checkpoint | None:
    """What the model in `folder` has in fp8, if it is one of two published formats: compressed-tensors with a scale for
    each output channel and activations scaled per token, and the official one with a scale for each block (DeepSeek,
    Qwen3)."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict):
        return None
    if settings.get("quant_method") == "compressed-tensors" and channels_and_tokens(settings):
        block = None
    elif settings.get("quant_method") == "fp8" and settings.get("weight_block_size"):
        rows, columns = settings["weight_block_size"]
        block = (int(rows), int(columns))
    else:
        return None
    suffix = ".weight_scale_inv" if block else ".weight_scale"
    layers: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            layers |= {name.removesuffix(suffix) for name in tensors.keys() if name.endswith(suffix)}  # noqa: SIM118
    return Fp8Checkpoint(tuple(sorted(layers)), block)


def prepare(model: nn.Module, checkpoint: Fp8Checkpoint) -> None:
    """Puts a layer that takes the checkpoint's tensors as they are in the place of each that is in fp8.

    Raises:
        ValueError: the model has no such linear layer.
    """
    for name in checkpoint.layers:
        owner, _, last = name.rpartition(".")
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise ValueError(f"{name} is in fp8, which is read for plain linear layers alone")
        layer = Fp8Linear(linear) if checkpoint.block is None else _BlockLinear(linear, checkpoint.block)
        layer.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=FP8), requires_grad=False)
        setattr(model.get_submodule(owner), last, layer)


def expand_blocks(model: nn.Module, dtype: torch.dtype, convert: bool, merge: Merge | None = None) -> None:
    """Makes plain linear layers of those with a scale for each block, one by one, each with an adapter's product if
    it has one; converted to the format that our products take, if wanted, which rounds them once more."""
    for path, module in list(model.named_modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, _BlockLinear):
                linear = child.expanded(dtype)
                if merge is not None:
                    linear.weight.data = merge.merged(f"{path}.{name}", linear.weight.data).to(dtype)
                setattr(module, name, _converted(linear) if convert else linear)


def _converted(linear: nn.Linear) -> Fp8Linear:
    layer = Fp8Linear(linear)
    layer.quantize()
    return layer


class _BlockLinear(nn.Module):
    """A checkpoint's weight with a scale for each block, as it is read; nothing is computed with it."""

    def __init__(self, linear: nn.Linear, block: tuple[int, int]) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias
        self._block = block
        blocks = [-(-length // size) for length, size in zip(linear.weight.shape, block, strict=True)]
        scale = torch.empty(blocks, dtype=torch.float32, device=linear.weight.device)
        self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)

    def expanded(self, dtype: torch.dtype) -> nn.Linear:
        rows, columns = self.weight.shape
        scale: Tensor = self.weight_scale_inv.data
        for axis, size in enumerate(self._block):
            scale = scale.repeat_interleave(size, dim=axis)
        weight = (self.weight.data.float() * scale[:rows, :columns]).to(dtype)
        linear = nn.Linear(columns, rows, bias=self.bias is not None, device="meta")
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear
