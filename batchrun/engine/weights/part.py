"""A rank's part of a model, as whoever loads it asks for it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from batchrun.engine.weights.lora import Lora


class Part(Protocol):
    """Which numbers of a model are a rank's."""

    def of_weight(self, name: str, weight: Tensor) -> Tensor:
        """What of a whole weight is."""
        ...

    def of_adapter(self, adapter: dict[str, Lora]) -> dict[str, Lora]:
        """What of an adapter, by the names of its layers, is."""
        ...
