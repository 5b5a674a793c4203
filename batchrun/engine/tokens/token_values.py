"""What an engine gives beside each token of an answer, computed from the logits on the device: log probabilities."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from batchrun.engine.protocol import Sampling, TokenValues

if TYPE_CHECKING:
    # Not at run time: the worker, which joins values too, needs no torch.
    from torch import Tensor


class ValuesOfTokens:
    """The columns of values that a job asks for; false where it asks for none.

    Both engines call `compute` in their decode step and carry whatever it names up to the completion: a new column
    is one more entry here.
    """

    def __init__(self, sampling: Sampling) -> None:
        self.top = sampling.logprobs

    def __bool__(self) -> bool:
        return self.top is not None

    def compute(self, logits: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """Each column's values, (rows,) or (rows, width); rows without a token (below 0) get what is not to be read.

        Log probabilities are those of the model: before penalties, temperature and whatever narrows the choice.

        Args:
            logits: (rows, vocabulary), as the model gives them.
            tokens: (rows,) int64, the chosen ones.
        """
        if self.top is None:
            return {}
        logits = logits.float()
        total = logits.logsumexp(dim=-1, keepdim=True)
        values = {"logprobs": (logits.gather(1, tokens.clamp(min=0)[:, None]) - total)[:, 0]}
        if self.top:
            best = logits.topk(min(self.top, logits.shape[1]), dim=-1)
            values |= {"top_tokens": best.indices.int(), "top_logprobs": best.values - total}
        return values


def to_numpy(columns: dict[str, Tensor]) -> TokenValues:
    """The same on the host."""
    return {name: column.cpu().numpy() for name, column in columns.items()}


def first(values: TokenValues, tokens: int) -> TokenValues:
    """Those of the first so many tokens."""
    return {name: column[:tokens] for name, column in values.items()}


def join(parts: list[TokenValues]) -> TokenValues:
    """Those of several runs of tokens, one after another; runs without tokens may have none."""
    parts = [part for part in parts if part]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
