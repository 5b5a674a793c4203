"""Stop strings: found in the text of the newest tokens, at the token that completes one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import transformers

from batchrun.engine.protocol import EngineSpec
from batchrun.errors import ModelError, first_line


class StopStrings:
    """Looks for any of the spec's stop strings at the end of answers.

    Raises:
        ModelError: there are stop strings, but no tokenizer to decode with.
    """

    def __init__(self, spec: EngineSpec) -> None:
        self.strings = spec.sampling.stop
        # A token is at least one byte, special ones aside; a few more, since the first may be half a
        # character or lose its leading space.
        self.tail = max((len(string.encode()) for string in self.strings), default=0) + 4
        self._tokenizer: Any = _load_tokenizer(spec) if self.strings else None

    def __bool__(self) -> bool:
        return bool(self.strings)

    def completed(self, answers: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each answer's last `tail` tokens hold a stop string. Ask after every token."""
        texts = self._tokenizer.batch_decode(
            [answer[-self.tail :] for answer in answers],
            skip_special_tokens=True,
            clean_up_tokenization_spaces=False,
        )
        return [any(string in text for string in self.strings) for text in texts]


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
