"""Text to token ids, by the fast tokenizer's own batch call where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from batchrun.engine.protocol import TokenIds
from batchrun.prompt.special import Guarded, SpecialTokens

# A tokenized text takes over a hundred bytes per token until its ids are copied out.
_CHUNK_CHARS = 2 << 20


class Encoder:
    """`frame` is how many special tokens the tokenizer puts before and after a text."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        if self._fast is not None:
            # tokenizer.json may carry the settings of its training; another thread may be encoding already.
            if self._fast.truncation is not None:
                self._fast.no_truncation()
            if self._fast.padding is not None:
                self._fast.no_padding()
        self.special = SpecialTokens(tokenizer)
        self.frame = self._find_frame()

    def encode(self, texts: Sequence[str], special_tokens: bool) -> list[TokenIds]:
        """(texts,) int32 arrays of token ids, with the tokenizer's special tokens around them or without."""
        guarded = {
            i: self.special.encode(t, special_tokens) for i, t in enumerate(texts) if isinstance(t, Guarded)
        }
        if not guarded:
            return self._encode(texts, special_tokens)
        others = iter(self._encode([t for i, t in enumerate(texts) if i not in guarded], special_tokens))
        return [guarded[i] if i in guarded else next(others) for i in range(len(texts))]

    def _encode(self, texts: Sequence[str], special_tokens: bool) -> list[TokenIds]:
        if self._fast is None:
            encoded = (self.tokenizer.encode(text, add_special_tokens=special_tokens) for text in texts)
            return [np.array(ids, dtype=np.int32) for ids in encoded]
        return [
            np.array(encoding.ids, dtype=np.int32)
            for chunk in _chunks(texts)
            for encoding in self._fast.encode_batch_fast(chunk, add_special_tokens=special_tokens)
        ]

    def drop(self, text: str, count: int, side: str) -> str:
        """The text without its first ("left") or last ("right") `count` tokens, at least a character shorter:
        a character of several tokens goes with the first of them."""
        if self._fast is None:
            ids = self.tokenizer.encode(text, add_special_tokens=False)
            kept: str = self.tokenizer.decode(
                ids[count:] if side == "left" else ids[: max(0, len(ids) - count)]
            )
        else:
            offsets = self._fast.encode(text, add_special_tokens=False).offsets
            if count >= len(offsets):
                return ""
            kept = text[offsets[count - 1][1] :] if side == "left" else text[: offsets[-count][0]]
        if len(kept) < len(text):
            return kept
        return text[1:] if side == "left" else text[:-1]

    def _find_frame(self) -> tuple[int, int]:
        """Encodes a text with and without special tokens: the first one that has any token of its own."""
        vocabulary = islice(self.tokenizer.get_vocab(), 100)
        special = set(self.tokenizer.all_special_tokens)
        for probe in ("a", *(token for token in vocabulary if token not in special)):
            bare, framed = (self.encode([probe], with_them)[0].tolist() for with_them in (False, True))
            for before in range(len(framed) - len(bare) + 1 if bare else 0):
                if framed[before : before + len(bare)] == bare:
                    return before, len(framed) - len(bare) - before
        return 0, 0


def _chunks(texts: Sequence[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    size = 0
    for text in texts:
        if chunk and size + len(text) > _CHUNK_CHARS:
            yield chunk
            chunk, size = [], 0
        chunk.append(text)
        size += len(text)
    if chunk:
        yield chunk
