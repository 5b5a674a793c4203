"""Linear layers that read the same input become one matrix product, without touching the model's code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names that transformers' models give to such layers, in the order in which they are called."""


class _Product:
    """One product for several layers; `parts` holds it from the first layer's call to the last one's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, sizes
        self.input: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()


class JoinedLinear(nn.Module):
    """The layer at place `number` of a joined product. Called out of turn, it computes its own part alone."""

    def __init__(self, own: nn.Linear, product: _Product, number: int) -> None:
        super().__init__()
        self.weight, self.bias = own.weight, own.bias
        self.in_features, self.out_features = own.in_features, own.out_features
        self._product, self._number = product, number

    def forward(self, x: Tensor) -> Tensor:
        product = self._product
        if self._number == 0:
            product.input = x
            joined = functional.linear(x, product.weight, product.bias)
            product.parts = torch.split(joined, product.sizes, dim=-1)
        if product.input is not x:
            return functional.linear(x, self.weight, self.bias)
        part = product.parts[self._number]
        if self._number == len(product.sizes) - 1:
            product.input, product.parts = None, ()
        return part


def join_projections(model: nn.Module) -> int:
    """Joins the weights of each group in GROUPS; the layers' own weights become views. Gives the number of groups.

    A GPU runs one product of a few hundred rows in hardly more time than each of its parts.
    """
    joined = 0
    for module in list(model.modules()):
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            if _alike(layers):
                _join(module, names, layers)  # type: ignore[arg-type]
                joined += 1
    return joined


def _alike(layers: list[nn.Module | None]) -> bool:
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    first = layers[0]
    return all(
        layer.in_features == first.in_features  # type: ignore[union-attr]
        and layer.weight.dtype == first.weight.dtype  # type: ignore[union-attr]
        and (layer.bias is None) == (first.bias is None)  # type: ignore[union-attr]
        for layer in layers
    )


def _join(module: nn.Module, names: tuple[str, ...], layers: list[nn.Linear]) -> None:
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = torch.cat([layer.bias.data for layer in layers]) if layers[0].bias is not None else None
    product = _Product(weight, bias, sizes)
    for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
        begin = sum(sizes[:number])
        layer.weight.data = weight[begin : begin + sizes[number]]
        if bias is not None:
            layer.bias.data = bias[begin : begin + sizes[number]]
        setattr(module, name, JoinedLinear(layer, product, number))
