"""What the scheduler has the device do next: prompts to prefill, sequences to decode."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.paged.schedule.page_pool import NULL_PAGE
from batchrun.engine.paged.schedule.sequence import Sequence

Ints = NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class PrefillChunk:
    """Prompt tokens `start` to `stop` of a sequence, computed in one prefill batch. `copied` leading tokens of its
    page `copy_to` are first copied from page `copy_from`."""

    sequence: Sequence
    start: int
    stop: int
    copy_from: int = NULL_PAGE
    copy_to: int = NULL_PAGE
    copied: int = 0

    @property
    def complete(self) -> bool:
        """The sequence's first new token comes out of this prefill batch."""
        return self.stop == len(self.sequence.prompt)


@dataclass(frozen=True, slots=True)
class DecodeBatch:
    """`steps` decode steps for some sequences, those with most tokens in the pool first.

    `block_tables` (sequences, pages) int32 are their pages. `prompt_order` (sequences,) int32 are their numbers in the
    order of their prompts, and `common` (sequences,) int32 how many leading tokens each of these has in common with the
    one before it: tokens that are in the pages of both.
    """

    sequences: list[Sequence]
    slots: Ints
    block_tables: Ints
    steps: int
    prompt_order: Ints
    common: Ints
