"""Linear layers that read the same input become one matrix product, without touching the model's code."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names that transformers' models give to such layers, in the order in which they are called."""


class _FusedProjection:
    """One product for several layers; `parts` holds it from the first layer's call to the last one's."""

    def __init__(self, weight: Tensor, bias: Tensor | None, sizes: list[int]) -> None:
        self.weight, self.bias, self.sizes = weight, bias, sizes
        self.input: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()


class FusedLinear(nn.Module):
    """The layer at place `number` of a joined product. Called out of turn, it computes its own part alone."""

    def __init__(self, own: nn.Linear, product: _FusedProjection, number: int) -> None:
        super().__init__()
        self.weight, self.bias = own.weight, own.bias
        self.in_features, self.out_features = own.in_features, own.out_features
        self._product, self._number = product, number

    def forward(self, x: Tensor) -> Tensor:
        """(..., out features) of (..., in features). The first of the product computes all, the others take theirs."""
        product = self._product
        if self._number == 0:
            product.input = x
            fused = functional.linear(x, product.weight, product.bias)
            product.parts = torch.split(fused, product.sizes, dim=-1)
        if product.input is not x:
            return functional.linear(x, self.weight, self.bias)
        part = product.parts[self._number]
        if self._number == len(product.sizes) - 1:
            product.input, product.parts = None, ()
        return part


def fuse_projections(model: nn.Module) -> int:
    """Joins the weights of each group in GROUPS; the layers' own weights become views. Gives the number of groups.

    A GPU runs one product of a few hundred rows in hardly more time than each of its parts.
    """
    fused = 0
    for module in list(model.modules()):
        for names in GROUPS:
            layers = [getattr(module, name, None) for name in names]
            if _fusable(layers):
                _fuse(module, names, layers)  # type: ignore[arg-type]
                fused += 1
    return fused


def _fusable(layers: list[nn.Module | None]) -> bool:
    if not all(type(layer) is nn.Linear for layer in layers):
        return False
    first = layers[0]
    return all(
        layer.in_features == first.in_features  # type: ignore[union-attr]
        and layer.weight.dtype == first.weight.dtype  # type: ignore[union-attr]
        and (layer.bias is None) == (first.bias is None)  # type: ignore[union-attr]
        for layer in layers
    )


def _fuse(module: nn.Module, names: tuple[str, ...], layers: list[nn.Linear]) -> None:
    sizes = [layer.out_features for layer in layers]
    weight = torch.cat([layer.weight.data for layer in layers])
    bias = torch.cat([layer.bias.data for layer in layers]) if layers[0].bias is not None else None
    product = _FusedProjection(weight, bias, sizes)
    for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
        begin = sum(sizes[:number])
        layer.weight.data = weight[begin : begin + sizes[number]]
        if bias is not None:
            layer.bias.data = bias[begin : begin + sizes[number]]
        setattr(module, name, FusedLinear(layer, product, number))
