"""Row values that spell special tokens, kept from becoming them: a row must not forge a role.

A value that spells one gets a mark inside, which no text can hold (half of a surrogate pair), before it goes into any
template. After rendering, whatever the tokenizer would take for a special token is the template's own. Such a text is
encoded by a second tokenizer, in which special tokens are spelled in a way that no row can guess.
"""

from __future__ import annotations

import json
import re
import secrets
import threading
from collections.abc import Sequence
from typing import Any

import numpy as np
from tokenizers import Tokenizer

from batchrun.engine.protocol import TokenIds

MARK = "\udfff"


class Guarded(str):
    """A text in which row values spell special tokens; `marked` is the same with a mark in each spelling."""

    marked: str

    @classmethod
    def of(cls, marked: str) -> Guarded:
        """The text without its marks, which `marked` keeps."""
        text = cls(marked.replace(MARK, ""))
        text.marked = marked
        return text


class SpecialTokens:
    """The tokenizer's special tokens, as row values may spell them and as a template does."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._fast = tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        added = tokenizer.added_tokens_decoder
        if self._fast is not None:
            added = self._fast.get_added_tokens_decoder()
        names = sorted((t.content for t in added.values() if t.special and t.content), key=len, reverse=True)
        self._names = names
        self._spelled = re.compile("|".join(map(re.escape, names)) or "(?!)")
        # A filter may change the case, so that any case counts.
        self._suspect = re.compile(self._spelled.pattern, re.IGNORECASE)
        lower = [name.lower() for name in names]
        self._heads = {name[:i] for name in lower for i in range(1, len(name))}
        self._tails = {name[i:] for name in lower for i in range(1, len(name))}
        self._longest = max(map(len, names), default=0)
        self._hints = {name[0] for name in lower} | {name[-1] for name in lower}
        self._lock = threading.Lock()
        self._unguessable: _Respelled | None = None

    def guard(self, value: Any) -> Any:
        """The value with a mark in every special token that it spells, and at its ends where it could be a part of
        one together with what a template puts beside it. Most values come back as they are."""
        if isinstance(value, str):
            return self._guarded(value) if any(hint in value for hint in self._hints) else value
        if isinstance(value, list):
            return [self.guard(item) for item in value]
        if isinstance(value, dict):
            return {self.guard(key): self.guard(item) for key, item in value.items()}
        return value

    def encode(self, text: Guarded, special_tokens: bool) -> TokenIds:
        """int32 token ids of a text, of which only the special tokens without a mark are special tokens."""
        if self._fast is None:
            return np.array(self._encode_in_pieces(text.marked, special_tokens), dtype=np.int32)
        with self._lock:
            if self._unguessable is None:
                self._unguessable = _Respelled(self._fast, self._names)
            unguessable = self._unguessable
        respelled = self._spelled.sub(lambda m: unguessable.names[m[0]], text.marked).replace(MARK, "")
        ids = unguessable.tokenizer.encode(respelled, add_special_tokens=special_tokens).ids
        return np.array(ids, dtype=np.int32)

    def _guarded(self, value: str) -> str:
        marked = self._suspect.sub(lambda m: f"{m[0][0]}{MARK}{m[0][1:]}", value)
        lower = value.lower()
        reach = range(1, min(self._longest, len(lower) + 1))
        before = MARK if any(lower[:i] in self._tails for i in reach) else ""
        after = MARK if any(lower[-i:] in self._heads for i in reach) else ""
        return f"{before}{marked}{after}"

    def _encode_in_pieces(self, marked: str, special_tokens: bool) -> list[int]:
        """For tokenizers written in Python: special tokens by their names, all that is between them as text."""
        ids: list[int] = []
        end = 0
        for match in self._spelled.finditer(marked):
            ids += self._plain(marked[end : match.start()])
            ids.append(self._tokenizer.convert_tokens_to_ids(match[0]))
            end = match.end()
        ids += self._plain(marked[end:])
        return self._tokenizer.build_inputs_with_special_tokens(ids) if special_tokens else ids

    def _plain(self, marked: str) -> list[int]:
        def encode(text: str) -> list[int]:
            found: list[int] = self._tokenizer.encode(
                text, add_special_tokens=False, split_special_tokens=True
            )
            return found

        ids = encode(marked.replace(MARK, ""))
        if set(self._tokenizer.convert_tokens_to_ids(self._names)).isdisjoint(ids):
            return ids
        # A vocabulary may hold the spelling as an ordinary piece; halves of it are none.
        return [token for half in marked.split(MARK) for token in encode(half)]


class _Respelled:
    """The same tokenizer with other `names` for its special tokens, ids unchanged."""

    def __init__(self, tokenizer: Tokenizer, names: Sequence[str]) -> None:
        secret = secrets.token_hex(8)
        self.names = {name: f"\ufdd0{secret}{i}\ufdd1" for i, name in enumerate(names)}
        tree = json.loads(tokenizer.to_str())
        for token in tree["added_tokens"]:
            if token["content"] in self.names:
                token |= {"content": self.names[token["content"]], "normalized": False}
        model = tree["model"]
        if isinstance(model["vocab"], dict):
            model["vocab"] = {self.names.get(piece, piece): i for piece, i in model["vocab"].items()}
        else:
            model["vocab"] = [[self.names.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in self.names:
            model["unk_token"] = self.names[model["unk_token"]]
        if "merges" in model:
            model["merges"] = [pair for pair in model["merges"] if self._is_kept(pair)]
        self.tokenizer = Tokenizer.from_str(json.dumps(tree))

    def _is_kept(self, pair: str | list[str]) -> bool:
        left, right = pair.split(" ") if isinstance(pair, str) else pair
        return self.names.keys().isdisjoint((left, right, left + right))


def cut(marked: str, kept: str, side: str) -> str:
    """The end ("left" is cut off) or the start of a marked text that reads as `kept` without its marks."""
    if MARK not in marked:
        return kept
    characters = marked if side == "right" else marked[::-1]
    left = len(kept)
    for end, character in enumerate(characters):
        if left == 0:
            return characters[:end] if side == "right" else characters[:end][::-1]
        left -= character != MARK
    return marked
