"""Checkpoints that are published in fp8: which of their layers are, and how those are scaled."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from batchrun.engine.layers.fp8 import FP8, Fp8Linear
from batchrun.engine.weights.packed_format import channels_and_tokens


@dataclass(frozen=True, slots=True)
class Fp8Checkpoint:
    """The layers in fp8 by name, each row of whose weights has a scale, as our products take them."""

    layers: tuple[str, ...]


def fp8_checkpoint(folder: str, config: Any) -> Fp8Checkpoint | None:
    """What the model in `folder` has in fp8 as compressed-tensors publishes it, with a scale for each output channel
    and activations scaled per token; None where its config names another format."""
    settings = getattr(config, "quantization_config", None)
    if not isinstance(settings, dict) or settings.get("quant_method") != "compressed-tensors":
        return None
    if not channels_and_tokens(settings):
        return None
    suffix = ".weight_scale"
    layers: set[str] = set()
    for file in Path(folder).glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            layers |= {name.removesuffix(suffix) for name in tensors.keys() if name.endswith(suffix)}  # noqa: SIM118
    return Fp8Checkpoint(tuple(sorted(layers)))


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
        layer = Fp8Linear(linear)
        layer.weight = nn.Parameter(torch.empty_like(linear.weight, dtype=FP8), requires_grad=False)
        setattr(model.get_submodule(owner), last, layer)
