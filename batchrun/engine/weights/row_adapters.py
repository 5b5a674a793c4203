"""Several LoRA adapters in one model, of which each row has one or none."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchrun.engine.weights.lora import Lora, read_adapter
from batchrun.engine.weights.part import Part
from batchrun.errors import ModelError

MULTIPLE = 8
"""Columns that a layer gets are a multiple of it: products of half precision want rows of whole 16 bytes."""


class TokenAdapters:
    """Which adapter each token of a model call has, for all layers of a model: `tokens` (tokens,) int32, or (1,) for
    all of them alike. 0 is none, and adapters count from 1."""

    def __init__(self, device: torch.device) -> None:
        self.tokens = torch.zeros(1, dtype=torch.int32, device=device)

    @staticmethod
    def of(model: nn.Module) -> TokenAdapters | None:
        """Those of a model that has such layers; None of any other."""
        found = (module.current for module in model.modules() if isinstance(module, AdaptedLinear))
        return next(found, None)


class AdaptedLinear(nn.Module):
    """A linear layer to whose result each token's adapter adds its product, for tokens of any adapters in one call.

    All adapters' `a` (columns, in features) are applied to every token, and numbers of other adapters than its own
    become zero; so those of all tokens are one matrix product with what comes in, `weight` (out features, in features +
    columns) being the layer's own beside all adapters' b. It multiplies `columns / in features + columns / out
    features` more than the layer alone, little for tens of columns, passes over no result twice, and has the same
    shapes whatever rows there are.
    `of_column` (columns,) int32 is whose column each is.
    """

    of_column: Tensor

    def __init__(
        self, weight: Tensor, bias: Tensor | None, a: Tensor, of_column: Tensor, current: TokenAdapters
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = a.shape[1], len(weight)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
        self.a = nn.Parameter(a, requires_grad=False)
        self.register_buffer("of_column", of_column)
        self.current = current

    @classmethod
    def around(cls, linear: nn.Linear, loras: dict[int, Lora], current: TokenAdapters) -> Self:
        """The layer with the products of adapters, by their numbers."""
        like = linear.weight.data
        columns = sum(len(lora.a) for lora in loras.values())
        padding = -columns % MULTIPLE
        none = like.new_zeros(padding, linear.in_features), like.new_zeros(linear.out_features, padding)
        a = torch.cat([*(one.a.to(like) for one in loras.values()), none[0]])
        b = torch.cat([*(one.b.to(like) for one in loras.values()), none[1]], 1)
        owners = [number for number, one in loras.items() for _ in range(len(one.a))]
        of_column = torch.tensor([*owners, *[-1] * padding], dtype=torch.int32, device=like.device)
        return cls(torch.cat([like, b], 1), linear.bias, a, of_column, current)

    @classmethod
    def joined(cls, layers: Sequence[nn.Linear | AdaptedLinear]) -> Self:
        """One layer for several that read the same input, one of them adapted at least, whose weights become views of
        its own: results stand one behind the other."""
        adapted = [layer for layer in layers if isinstance(layer, AdaptedLinear)]
        inside = layers[0].in_features
        width = inside + sum(len(layer.a) for layer in adapted)
        whole = layers[0].weight.new_zeros(sum(layer.out_features for layer in layers), width)
        row, column = 0, inside
        for layer in layers:
            rows = whole[row : row + layer.out_features]
            rows[:, :inside] = layer.weight.data[:, :inside]
            if isinstance(layer, AdaptedLinear):
                rows[:, column : column + len(layer.a)] = layer.weight.data[:, inside:]
                column += len(layer.a)
            layer.weight.data = rows
            row += layer.out_features
        biases = [layer.bias.data for layer in layers if layer.bias is not None]
        return cls(
            whole,
            torch.cat(biases) if biases else None,
            torch.cat([layer.a.data for layer in adapted]),
            torch.cat([layer.of_column for layer in adapted]),
            adapted[0].current,
        )

    def forward(self, x: Tensor) -> Tensor:
        """(..., out features) of (..., in features)."""
        low = functional.linear(x, self.a)
        # Not multiplied with 0: what another adapter makes of a token may be infinite.
        low = torch.where(self.of_column == self.current.tokens[..., None], low, 0)
        return functional.linear(torch.cat([x, low], -1), self.weight, self.bias)


def attach_adapters(model: Any, folders: Sequence[str], part: Part | None = None) -> None:
    """Reads adapters, numbered from 1 in this order, and has the model's layers add their products; of a rank's `part`
    of a model, those of its part of them.

    Raises:
        ModelError: see `read_adapter` and `attach`.
    """
    adapters = [read_adapter(folder) for folder in folders]
    attach(model, adapters if part is None else [part.of_adapter(one) for one in adapters], folders)


def attach(model: Any, adapters: Sequence[dict[str, Lora]], names: Sequence[str]) -> None:
    """The same for adapters that have been read, by their layers; `names` are for messages.

    Raises:
        ModelError: a layer that the model does not have, or of another size; one that is not plain linear, or gives
            the logits.
    """
    by_layer: dict[str, dict[int, Lora]] = {}
    for number, (loras, name) in enumerate(zip(adapters, names, strict=True), 1):
        for layer, lora in loras.items():
            _refuse_unfit(model, layer, lora, name)
            by_layer.setdefault(layer, {})[number] = lora
    current = TokenAdapters(model.device)
    for layer, of_layer in by_layer.items():
        owner, _, last = layer.rpartition(".")
        module = AdaptedLinear.around(model.get_submodule(layer), of_layer, current)
        setattr(model.get_submodule(owner), last, module)


def _refuse_unfit(model: Any, layer: str, lora: Lora, name: str) -> None:
    merge = "merge it: model.adapter, in a job of its own"
    try:
        module: nn.Module = model.get_submodule(layer)
    except AttributeError:
        what = f"is for another model: this one has no layer {layer}"
        raise ModelError(what, name, "use the model that it was trained on") from None
    if type(module) is not nn.Linear:
        what = f"{layer} is {type(module).__name__} here, and rows have adapters of plain linear layers only"
        raise ModelError(what, name, merge)
    if module is model.get_output_embeddings():
        raise ModelError(f"{layer} gives the logits, which no row has an adapter for", name, merge)
    if (have := [len(lora.b), lora.a.shape[1]]) != (want := [*module.weight.shape]):
        what = f"is for another model: its {layer} is {_size(have)}, and the model's {_size(want)}"
        raise ModelError(what, name, "use the model that it was trained on")


def _size(shape: Sequence[int]) -> str:
    return " x ".join(map(str, shape))
