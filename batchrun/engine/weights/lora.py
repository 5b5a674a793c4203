"""LoRA adapters: read from what PEFT saves, and merged into a model's weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from batchrun.engine.weights.lora_config import MERGE_FIX, WEIGHTS, LoraConfig, matrices_by_layer
from batchrun.errors import ModelError

if TYPE_CHECKING:
    from batchrun.engine.weights.part import Part


@dataclass(frozen=True, slots=True)
class Lora:
    """What an adapter adds to a linear layer: x becomes `b @ a @ x` more, the scale being in `b`.

    `a` (rank, in features), `b` (out features, rank), both float32.
    """

    a: Tensor
    b: Tensor


def read_adapter(folder: str) -> dict[str, Lora]:
    """An adapter by the names of its layers.

    Raises:
        ModelError: see `LoraConfig.read` and `matrices_by_layer`; unreadable weights; numbers that are not finite.
    """
    config, file = LoraConfig.read(folder), str(Path(folder) / WEIGHTS)
    try:
        tensors = load_file(file)
    except (OSError, SafetensorError) as error:
        raise ModelError(f"its weights cannot be read ({error})", file, "copy the file again") from None
    found = {}
    for layer, (a, b) in matrices_by_layer(tensors, file).items():
        scale = config.scale(layer, len(tensors[a]))
        found[layer] = Lora(tensors[a].float(), tensors[b].float() * scale)
        if not (found[layer].a.isfinite().all() and found[layer].b.isfinite().all()):
            raise ModelError(f"numbers of {layer} are not finite", file, "use another checkpoint of it")
    return found


class Merge:
    """An adapter on its way into a model's weights, each of which gets its product once: while it is loaded, or by
    `into` once it is."""

    def __init__(self, folder: str, part: Part | None = None) -> None:
        """Reads the adapter, or a rank's part of it. Raises ModelError as `read_adapter` does."""
        whole = read_adapter(folder)
        self._folder, self._left = folder, whole if part is None else part.of_adapter(whole)

    @classmethod
    def of(cls, folder: str | None, part: Part | None = None) -> Self | None:
        """None where there is no adapter."""
        return None if folder is None else cls(folder, part)

    def merged(self, layer: str, weight: Tensor, transposed: bool = False) -> Tensor:
        """The weight (out features, in features; `transposed` the other way) with the layer's product, in float32; the
        weight itself where there is none. Raises ModelError: the shapes do not fit."""
        lora = self._left.pop(layer, None)
        if lora is None:
            return weight
        change = lora.b.to(weight.device) @ lora.a.to(weight.device)
        change = change.t() if transposed else change
        if change.shape != weight.shape:
            what = f"is for another model: its {layer} is {_size(change)}, and the model's {_size(weight)}"
            raise ModelError(what, self._folder, "use the model that it was trained on")
        return weight.float() + change

    def into(self, model: Any) -> None:
        """Merges what was not merged while loading.

        Raises:
            ModelError: the model has no such linear layer, or another layer shares its weight.
        """
        for layer in list(self._left):
            module = self._module(model, layer)
            weight = self.merged(layer, module.weight.data, isinstance(module, Conv1D))
            module.weight.data.copy_(weight)

    def _module(self, model: Any, layer: str) -> nn.Linear | Conv1D:
        try:
            module: nn.Module = model.get_submodule(layer)
        except AttributeError:
            what = f"is for another model: this one has no layer {layer}"
            raise ModelError(what, self._folder, "use the model that it was trained on") from None
        if not isinstance(module, nn.Linear | Conv1D):
            what = (
                f"{layer} is {type(module).__name__} here, and adapters are merged into plain linear layers"
            )
            raise ModelError(what, self._folder, MERGE_FIX)
        if module.weight is model.get_input_embeddings().weight:
            what = f"{layer} shares its weight with the embeddings, which the adapter is not for"
            raise ModelError(what, self._folder, MERGE_FIX)
        return module


def _size(weight: Tensor) -> str:
    return " x ".join(map(str, weight.shape))
