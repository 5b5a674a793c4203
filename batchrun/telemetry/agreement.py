"""How far answers with fp8 agree with those without: measured by a plan, remembered on this machine."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from batchrun.hashing import stable_hash
from batchrun.model.fingerprint import cache_folder

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Agreement:
    """What became of the same `rows`, generated greedily without `quantization`, as `Job.fp8` names it, and with it.

    `same` of them have the same answer, token by token. Of the `tokens` of the answers without it, `agreeing` stand
    before the first difference of their row; `first_difference` is the median of its places (from 1) where there is
    one. `logprob_difference` is the mean distance of the log probabilities (natural logarithm) of agreeing tokens.
    `ended` and `quantized_ended` count answers that ended by themselves, without and with it: of a job with a schema
    these are the valid ones.
    """

    quantization: str
    rows: int
    same: int
    tokens: int
    agreeing: int
    first_difference: int | None
    logprob_difference: float
    ended: int
    quantized_ended: int

    def __str__(self) -> str:
        """For a person."""
        others = ""
        if self.first_difference is not None:
            others = f" (the others differ from token {self.first_difference:,} on, in the median)"
        end = "answer ends by itself" if self.quantized_ended == 1 else "answers end by themselves"
        return (
            f"{self.same:,} of {self.rows:,} sampled rows have the same greedy answer with {self.quantization} as "
            f"without{others}; {self.agreeing / max(1, self.tokens):.1%} of the tokens stand before a difference, and "
            f"their log probabilities differ by {self.logprob_difference:.2g} on average; {self.quantized_ended:,} "
            f"{end} with it, {self.ended:,} without"
        )


def remember(fingerprint: str, agreement: Agreement) -> Path:
    """Writes it in place of what was measured of the same model before.

    Args:
        fingerprint: the model's, as its folder has it.
    """
    path = _place(fingerprint, agreement.quantization)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(asdict(agreement)))
    temporary.replace(path)
    return path


def recall(fingerprint: str, quantization: str) -> Agreement | None:
    """What this machine last measured of the model, None where it never did."""
    path = _place(fingerprint, quantization)
    try:
        return Agreement(**json.loads(path.read_text()))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        log.warning("%s is left out: %s", path, error)
        return None


def _place(fingerprint: str, quantization: str) -> Path:
    return cache_folder() / "agreement" / f"{stable_hash([fingerprint, quantization])[:32]}.json"
