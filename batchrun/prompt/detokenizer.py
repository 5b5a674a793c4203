"""Generated token ids to the text of the answer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from batchrun.engine.protocol import TokenIds


class Detokenizer:
    """Decodes answers: without the stop token that ended them, without special tokens, cut before the first
    of the `stop` texts."""

    def __init__(self, tokenizer: Any, stop: Sequence[str], stop_token_ids: Iterable[int]) -> None:
        self._tokenizer, self._stop, self._ending = tokenizer, tuple(stop), frozenset(stop_token_ids)
        self._fast = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None

    def decode(
        self, answers: Sequence[TokenIds], stops: Sequence[Sequence[str] | None] | None = None
    ) -> list[str]:
        """(answers,) texts of int32 arrays of token ids; spaces are left as they were generated. `stops` (answers,)
        are those that some have in place of `stop`."""
        ids = [self._without_ending(answer.tolist()) for answer in answers]
        if self._fast is not None:
            texts = self._fast.decode_batch(ids, skip_special_tokens=True)
        else:
            texts = [
                self._tokenizer.decode(row, skip_special_tokens=True, clean_up_tokenization_spaces=False)
                for row in ids
            ]
        if stops is not None:
            return [self.before_stop(text, own) for text, own in zip(texts, stops, strict=True)]
        return [self.before_stop(text) for text in texts] if self._stop else texts

    def decode_whole(self, answer: TokenIds) -> str:
        """The text of one answer with the special tokens that it holds, and whatever `stop` texts."""
        ids = self._without_ending(answer.tolist())
        if self._fast is not None:
            return str(self._fast.decode(ids, skip_special_tokens=False))
        return str(self._tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    def before_stop(self, text: str, own: Sequence[str] | None = None) -> str:
        """The text up to the first of the `stop` texts, or of an answer's `own`."""
        stops = self._stop if own is None else own
        places = [place for stop in stops if (place := text.find(stop)) >= 0]
        return text[: min(places)] if places else text

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The text of each token alone, special ones by their names; a part of a character is U+FFFD."""
        return [self._tokenizer.decode([one], clean_up_tokenization_spaces=False) for one in ids]

    def _without_ending(self, ids: list[int]) -> list[int]:
        return ids[:-1] if ids and ids[-1] in self._ending else ids
