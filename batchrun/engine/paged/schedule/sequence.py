"""A request on its way through the scheduler, and how far two prompts agree."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from batchrun.engine.protocol import Request, TokenIds, TokenValues

NO_ROOT = b""
"""What prompts begin with in place of the digest of a page before them."""


def common_prefix(a: TokenIds, b: TokenIds) -> int:
    """How many leading tokens are equal."""
    shorter = min(len(a), len(b))
    different = a[:shorter] != b[:shorter]
    first = int(different.argmax()) if shorter else 0
    return first if shorter and different[first] else shorter


@dataclass(eq=False, slots=True)
class Sequence:
    """A request on its way: what has been generated, with the tokens' values, and the pages that it holds.

    `prompt` is what has to be in the pool before the next token: the request's tokens and, after an preemption, the
    output so far. `computed_tokens` of them are there. `final_len` is how many tokens the pool holds when the
    sequence is done. `scores` are the log probabilities of a request's scored tokens, as far as they are there.
    """

    request: Request
    prompt: TokenIds
    final_len: int
    output: list[int] = field(default_factory=list)
    values: list[TokenValues] = field(default_factory=list)
    computed_tokens: int = 0
    pages: list[int] = field(default_factory=list)
    slot: int = -1
    admission: int = -1
    finished: bool = False
    scores: NDArray[np.float32] | None = None

    @classmethod
    def of(cls, request: Request) -> Sequence:
        """The sequence of a request of which nothing is in the pool yet; what was generated before counts as prompt."""
        prompt = np.ascontiguousarray(request.start, dtype=np.int32)
        final_len = len(request.token_ids) + request.max_new_tokens - 1
        return cls(request, prompt, final_len, request.generated.tolist(), [request.values])

    @property
    def states(self) -> int:
        """How many of the prompt's last tokens have to be computed, whatever the pool holds of it."""
        return 1 if self.request.scored is None else self.request.scored.states

    @property
    def root(self) -> bytes:
        """What keys and values depend on besides the prompt."""
        adapter = self.request.adapter
        return adapter.to_bytes(4, "little") if adapter else NO_ROOT

    @property
    def new_tokens(self) -> int:
        """How many it may generate from here on."""
        return self.final_len + 1 - len(self.prompt)
