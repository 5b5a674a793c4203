"""How long answers become: what admission counts pages by."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


class OutputLengths:
    """What sequences are expected to generate, learned from those that have ended."""

    def __init__(self, certain: bool) -> None:
        self.certain = certain
        self._mean = 0.0
        self._seen = 0

    def learn(self, length: int) -> None:
        """Takes in a sequence that ended after so many tokens."""
        self._seen += 1
        self._mean += (length - self._mean) / min(self._seen, 1024)

    def expect(self, limits: NDArray[np.int32], generated: NDArray[np.int32]) -> NDArray[np.int32]:
        """Tokens that sequences will have generated when they end: (sequences,) of at most `limits`, above
        `generated`.

        Half as much again as the mean, because who guesses too low preempts sequences and computes them twice.
        """
        if self.certain:
            return limits
        typical = 1.5 * self._mean + 16 if self._seen >= 32 else limits / 4 + 16
        expected: NDArray[np.int32] = np.minimum(limits, np.maximum(typical, 1.25 * generated + 16)).astype(
            np.int32
        )
        return expected
