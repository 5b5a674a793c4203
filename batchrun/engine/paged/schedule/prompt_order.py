"""Which of the sequences at work begin alike, and how far: their prompts in order."""

from __future__ import annotations

from bisect import bisect_left

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.paged.schedule.sequence import NO_ROOT, common_prefix
from batchrun.engine.protocol import TokenIds


class PromptOrder:
    """Prompts of sequences in slots, sorted, so that those that begin alike stand side by side.

    Adding or removing one takes microseconds, whatever the others are; `slots` and `common` cost nothing.
    """

    def __init__(self, max_sequences: int) -> None:
        self._sorted: list[tuple[bytes, bytes, int]] = []
        self._keys: dict[int, tuple[bytes, bytes, int]] = {}
        self._slots = np.zeros(max_sequences, np.int32)
        self._common = np.zeros(max_sequences, np.int32)

    @property
    def slots(self) -> NDArray[np.int32]:
        """The slots in the order of their prompts."""
        return self._slots[: len(self._sorted)]

    @property
    def common(self) -> NDArray[np.int32]:
        """How many leading tokens each has in common with the one before it; 0 for the first."""
        return self._common[: len(self._sorted)]

    def add(self, slot: int, prompt: TokenIds, root: bytes = NO_ROOT) -> None:
        """Takes in a slot's prompt, int32; the slot must not be there yet. Prompts of different roots have nothing in
        common, whatever their tokens."""
        # Bytes sort in C. Their order is not the tokens', but equal beginnings stand together in it as well.
        key = self._keys[slot] = root, prompt.tobytes(), slot
        place, count = bisect_left(self._sorted, key), len(self._sorted)
        # What its neighbours have in common, one between them has too.
        known = int(self._common[place]) if place < count else 0
        for column in (self._slots, self._common):
            column[place + 1 : count + 1] = column[place:count]
        self._sorted.insert(place, key)
        self._slots[place] = slot
        self._common[place] = self._common_at(place, known)
        if place < count:
            self._common[place + 1] = self._common_at(place + 1, known)

    def remove(self, slot: int) -> None:
        """Forgets a slot's prompt; nothing happens if it is not there."""
        key = self._keys.pop(slot, None)
        if key is None:
            return
        place, last = bisect_left(self._sorted, key), len(self._sorted) - 1
        if place < last:
            # Sorted, the two that become neighbours have in common what both had with the one between them.
            self._common[place + 1] = min(self._common[place], self._common[place + 1])
        del self._sorted[place]
        for column in (self._slots, self._common):
            column[place:last] = column[place + 1 : last + 1]

    def _common_at(self, place: int, known: int) -> int:
        if not place or self._sorted[place - 1][0] != self._sorted[place][0]:
            return 0
        before, own = (np.frombuffer(self._sorted[i][1], np.int32)[known:] for i in (place - 1, place))
        return known + common_prefix(before, own)
