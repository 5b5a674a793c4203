"""How long answers will be, learned from those that are there: the driver shares out what is left by that."""

from __future__ import annotations

import threading

import numpy as np
from numpy.typing import NDArray

# Answers until which nothing is known.
FEW = 16


class AnswerLengths:
    """The least squares line of answers' tokens over their prompts', of all rows of a run that a worker has done.

    Limits of new tokens say little of it: most answers end before. Used by all attempts, each in a thread of its own.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Sums over answers: 1, prompt, answer, prompt squared, prompt times answer.
        self._sums = np.zeros(5)

    def add(self, prompt_tokens: int, answer_tokens: float) -> None:
        """An answer has come to its end."""
        x, y = float(prompt_tokens), float(answer_tokens)
        with self._lock:
            self._sums += (1.0, x, y, x * x, x * y)

    def expected(self, prompt_tokens: NDArray[np.int64], limits: NDArray[np.int64]) -> NDArray[np.float64]:
        """(rows,) Tokens of the answer to each prompt: 1 at least and its limit at most, which it is as long as nothing
        is known."""
        with self._lock:
            count, x, y, xx, xy = self._sums.tolist()
        if count < FEW:
            return limits.astype(np.float64)
        x, y = x / count, y / count
        variance = xx / count - x * x
        # Prompts of one length differ by rounding errors alone.
        slope = (xy / count - x * y) / variance if variance > 1e-9 * xx / count else 0.0
        return np.clip(y + slope * (prompt_tokens - x), 1.0, np.maximum(limits, 1))
