"""Linear layers that read the same input become one matrix product, without touching the model's code."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchrun.engine.layers.fp8 import Fp8Linear, fp8_linear
from batchrun.engine.weights.row_adapters import AdaptedLinear

_Linear = nn.Linear | Fp8Linear | AdaptedLinear

GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names that transformers' models give to such layers, in the order in which they are called."""


class _FusedProjection:
    """One product for several layers; `parts` holds it from the first layer's call to the last one's."""

    def __init__(self, layers: list[_Linear]) -> None:
        """Joins the layers' parameters, each of which becomes a view."""
        self.sizes = [layer.out_features for layer in layers]
        self.input: Tensor | None = None
        self.parts: tuple[Tensor, ...] = ()
        self.adapted: AdaptedLinear | None = None
        if any(isinstance(layer, AdaptedLinear) for layer in layers):
            self.adapted = AdaptedLinear.joined(layers)  # type: ignore[arg-type]
            return
        self.weight = _joined([layer.weight for layer in layers])
        self.bias = None if layers[0].bias is None else _joined([layer.bias for layer in layers])  # type: ignore[misc]
        scales = [layer.weight_scale for layer in layers if isinstance(layer, Fp8Linear)]
        self.weight_scale = _joined(scales) if scales else None

    def __call__(self, x: Tensor) -> Tensor:
        if self.adapted is not None:
            return cast(Tensor, self.adapted(x))
        if self.weight_scale is None:
            return functional.linear(x, self.weight, self.bias)
        return fp8_linear(x, self.weight, self.weight_scale, self.bias)


class FusedLinear(nn.Module):
    """The layer at place `number` of a joined product. Called out of turn, it computes its own part alone."""

    def __init__(self, own: _Linear, product: _FusedProjection, number: int) -> None:
        super().__init__()
        self.weight, self.bias = own.weight, own.bias
        self.in_features, self.out_features = own.in_features, own.out_features
        self._own, self._product, self._number = own, product, number

    def forward(self, x: Tensor) -> Tensor:
        """(..., out features) of (..., in features). The first of the product computes all, the others take theirs."""
        product = self._product
        if self._number == 0:
            product.input = x
            product.parts = torch.split(product(x), product.sizes, dim=-1)
        if product.input is not x and product.adapted is not None:
            return torch.split(product(x), product.sizes, dim=-1)[self._number]
        if product.input is not x:
            return cast(Tensor, self._own(x))
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
                product = _FusedProjection(layers)  # type: ignore[arg-type]
                for number, (name, layer) in enumerate(zip(names, layers, strict=True)):
                    setattr(module, name, FusedLinear(layer, product, number))  # type: ignore[arg-type]
                fused += 1
    return fused


def _fusable(layers: list[nn.Module | None]) -> bool:
    first, kinds = layers[0], {type(layer) for layer in layers}
    if kinds != {Fp8Linear} and not kinds <= {nn.Linear, AdaptedLinear}:
        return False
    return all(
        layer.in_features == first.in_features  # type: ignore[union-attr]
        and layer.weight.dtype == first.weight.dtype  # type: ignore[union-attr]
        and (layer.bias is None) == (first.bias is None)  # type: ignore[union-attr]
        for layer in layers
    )


def _joined(parameters: Sequence[Tensor]) -> Tensor:
    """The parameters one below the other; each becomes a view of the whole, which keeps no memory of its own."""
    whole = torch.cat([parameter.data for parameter in parameters])
    sizes = [len(parameter) for parameter in parameters]
    for parameter, part in zip(parameters, torch.split(whole, sizes), strict=True):
        parameter.data = part
    return whole
