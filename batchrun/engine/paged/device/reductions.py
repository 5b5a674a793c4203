"""How Inductor reduces a token's numbers in compiled layers: they are read once."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

from torch._inductor.choices import InductorChoices
from torch._inductor.virtualized import V

MOST_NUMBERS = 16384
"""That a block of threads holds in registers."""


class _Choices(InductorChoices):
    """Torch's own, but that a reduction of more than 1,024 numbers, or of 64 that do not lie one behind the other, is
    not read once to add up and again for each use.

    On an H200, microseconds of prefills of 8,192 tokens before and after: norms of 32 heads 159 and 93, of a layer of
    4,096 features, rounded to fp8, 91 and 64; gates of 3,072, rounded, 115 and 87, of 14,336 388 and 342. All compiled
    kernels of a layer: Llama-8B in fp8 13% less, Qwen3-0.6B in fp8 and Qwen3-30B-A3B in bf16 a quarter; of decode
    steps 7%, 15% and 13%.
    """

    @staticmethod
    def should_use_persistent_reduction(features: Any, cooperative_reduction: bool) -> bool:
        fits = V.graph.sizevars.statically_known_leq(features.reduction_numel, MOST_NUMBERS)
        return fits or InductorChoices.should_use_persistent_reduction(features, cooperative_reduction)


def read_once() -> AbstractContextManager[None]:
    """What is compiled inside is compiled so."""
    handler: AbstractContextManager[None] = V.set_choices_handler(_Choices())
    return handler
