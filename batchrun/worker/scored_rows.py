"""Rows that are scored: each row's requests, and their completions put together again."""

from __future__ import annotations

import numpy as np

from batchrun.engine.protocol import NO_TOKENS, Completion, Request
from batchrun.errors import ModelError
from batchrun.prompt.scoring import requests
from batchrun.prompt.tokens import Prompt


class ScoredRows:
    """A row's requests have the row as what is left of their ids when divided by `rows`, how many there are."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._parts: dict[int, list[Completion | None]] = {}

    def requests(self, row: int, prompt: Prompt, row_seed: int) -> list[Request]:
        """Those of a row, which has not been asked for before."""
        assert prompt.behind is not None
        parts = len(prompt.behind.requests)
        self._parts[row] = [None] * parts
        ids = [row + self._rows * part for part in range(parts)]
        return requests(prompt.token_ids, prompt.behind, row_seed, ids, prompt.adapter)

    def whole(self, completion: Completion) -> Completion | None:
        """The row's completion once all of its parts are there, as if it had been one request.

        Raises:
            ModelError: the engine gave no log probabilities.
        """
        part, row = divmod(completion.id, self._rows)
        parts = self._parts[row]
        parts[part] = completion
        done = [one for one in parts if one is not None]
        if len(done) < len(parts):
            return None
        del self._parts[row]
        for one in done:
            if one.finish_reason in ("cancelled", "error"):
                return Completion(row, NO_TOKENS, one.finish_reason, one.fault)
        if any("logprobs" not in one.values for one in done):
            fix = "set engine.kind to auto, padded or paged"
            raise ModelError("the engine gives no log probabilities of given tokens", "engine.kind", fix)
        logprobs = np.concatenate([one.values["logprobs"] for one in done])
        return Completion(row, NO_TOKENS, "stop", values={"logprobs": logprobs})
