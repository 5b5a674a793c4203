"""Stop strings: found in the text of the newest tokens, at the token that completes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from batchrun.engine.protocol import EngineSpec, Request
from batchrun.errors import ModelError, first_line


class StopStrings:
    """Looks for any of the spec's stop strings, or of a row's own, at the end of answers.

    Args:
        new_tokens: that answers grow by between two looks.

    Raises:
        ModelError: there are stop strings, but no tokenizer to decode with.
    """

    def __init__(self, spec: EngineSpec, new_tokens: int = 1) -> None:
        self._sampling = spec.sampling
        self._by_row = "stop" in spec.sampling.by_row
        self._new_tokens = new_tokens
        self._tokenizer: Any = _load_tokenizer(spec) if self else None

    def __bool__(self) -> bool:
        return bool(self._sampling.stop) or self._by_row

    def of(self, request: Request) -> tuple[str, ...]:
        """The strings that end this row."""
        own = request.sampling
        return own.stop if self._by_row and own is not None else self._sampling.stop

    def tail(self, strings: Sequence[str]) -> int:
        """Tokens at the end of an answer that hold whichever of the strings its newest tokens complete."""
        # A token is at least one byte, special ones aside; a few more, since the first may be half a
        # character or lose its leading space.
        return max((len(string.encode()) for string in strings), default=0) + 3 + self._new_tokens

    def completed(self, answers: Sequence[Sequence[int]], strings: Sequence[tuple[str, ...]]) -> list[bool]:
        """Whether each answer's last tokens hold one of its own `strings`. Ask after so many new tokens."""
        texts = self._tokenizer.batch_decode(
            [answer[-self.tail(own) :] for answer, own in zip(answers, strings, strict=True)],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [any(one in text for one in own) for text, own in zip(texts, strings, strict=True)]


def _load_tokenizer(spec: EngineSpec) -> Any:
    try:
        return transformers.AutoTokenizer.from_pretrained(
            spec.tokenizer_path, trust_remote_code=spec.trust_remote_code, local_files_only=True
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        what = f"stop strings need a tokenizer, and it cannot be loaded ({first_line(error)})"
        raise ModelError(
            what, spec.tokenizer_path, "give model.tokenizer, or leave generation.stop out"
        ) from error
