"""What a look at an adapter's files tells before any model is loaded: no LoRA, or one of another model."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from batchrun.engine.weights.lora_config import WEIGHTS, LoraConfig, matrices_by_layer
from batchrun.errors import ModelError
from batchrun.model.check import model_shapes, tensor_shapes
from batchrun.model.folder import ModelFolder


@dataclass(frozen=True, slots=True)
class AdapterFacts:
    """Of an adapter, for people: its largest rank, how many layers it changes, and their names in each block."""

    rank: int
    layers: int
    targets: tuple[str, ...]

    def __str__(self) -> str:
        return f"LoRA of rank {self.rank} on {self.layers} layers ({', '.join(self.targets)})"


def check_adapter(folder: str, model: ModelFolder) -> AdapterFacts:
    """Holds the adapter's shapes against the headers of the model's weights; of pickled ones nothing is known.

    Raises:
        ModelError: no LoRA adapter, one that is more than products for linear layers, damaged weights, or one of
            another model.
    """
    config = LoraConfig.read(folder)
    file = Path(folder) / WEIGHTS
    shapes = tensor_shapes(file)
    known = _Checkpoint.of(model_shapes(model.path, model.used).items())
    layers = matrices_by_layer(shapes, str(file))
    for layer, (a, b) in layers.items():
        _refuse_unfit(layer, shapes[a], shapes[b], known, str(file), config)
    return AdapterFacts(
        max(shapes[a][0] for a, _ in layers.values()),
        len(layers),
        tuple(sorted({layer.rpartition(".")[2] for layer in layers})),
    )


def _refuse_unfit(
    layer: str,
    a: list[int],
    b: list[int],
    known: _Checkpoint,
    where: str,
    config: LoraConfig,
) -> None:
    if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
        raise ModelError(
            f"the matrices of {layer} do not fit each other: {a} and {b}", where, "copy the adapter again"
        )
    if not known.weights:
        return
    fix = "use the model that it was trained on" + (f" ({config.base})" if config.base else "")
    if _place(layer) in known.fp8:
        what = f"its {layer} is in fp8 in the model's checkpoint, and cannot be added to"
        raise ModelError(what, where, "use the checkpoint in bfloat16")
    weights = known.weights.get(_place(layer))
    if weights is None:
        raise ModelError(f"is for another model: this one has no layer {layer}", where, fix)
    # Either way round, since some models keep their weights transposed.
    if not weights & {(b[0], a[1]), (a[1], b[0])}:
        have = " or ".join(" x ".join(map(str, shape)) for shape in sorted(weights))
        raise ModelError(
            f"is for another model: its {layer} is {b[0]} x {a[1]}, and the model's {have}", where, fix
        )


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """By their layers' places, the shapes of a checkpoint's weights, and those that are in fp8 and stay so."""

    weights: dict[tuple[str, ...], set[tuple[int, ...]]] = field(default_factory=dict)
    fp8: set[tuple[str, ...]] = field(default_factory=set)

    @classmethod
    def of(cls, tensors: Iterable[tuple[str, list[int]]]) -> Self:
        found = cls()
        for name, shape in tensors:
            layer, _, last = name.rpartition(".")
            if last == "weight" and len(shape) == 2:
                found.weights.setdefault(_place(layer), set()).add(tuple(shape))
            elif last == "weight_scale":
                found.fp8.add(_place(layer))
        return found


def _place(layer: str) -> tuple[str, ...]:
    """A layer's numbers and its own name: what is between them may be named otherwise in checkpoints than in models."""
    return (*re.findall(r"(?<=\.)\d+(?=\.)", f".{layer}"), layer.rpartition(".")[2])
