"""The bytes that every token of a tokenizer adds to an answer's text."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchrun.errors import ModelError

_ToBytes = Callable[[str], bytes]
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
# Random answers that are compared with what the tokenizer itself decodes.
_TRIES = 64


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """`tokens` (tokens,) are the bytes of each id, None for those that an answer never has: special and unused ones.

    `first` are their bytes at the very beginning of an answer, where some tokenizers lose a space; None: the same.
    """

    tokens: list[bytes | None]
    first: list[bytes | None] | None = None

    def cut(self, size: int) -> Vocabulary:
        """The first `size` tokens."""
        return Vocabulary(self.tokens[:size], None if self.first is None else self.first[:size])

    def text(self, ids: Sequence[int]) -> bytes:
        """The text of an answer's tokens."""
        first = self.tokens if self.first is None else self.first
        return b"".join((self.tokens if place else first)[i] or b"" for place, i in enumerate(ids))


def read_vocabulary(tokenizer: Any, where: str) -> Vocabulary:
    """The vocabulary of a transformers tokenizer; `where` names its folder.

    Raises:
        ModelError: its decoder is of a kind that is not known, or does not do what is known of it.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _unknown("it is not a fast tokenizer", where)
    spec = json.loads(backend.to_str())
    steps = _decoder_steps(spec["decoder"])
    kinds = [step["type"] for step in steps]
    special = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    special |= {*tokenizer.all_special_tokens}
    to_bytes: _ToBytes = _byte_level
    to_first: _ToBytes | None = None
    if "Metaspace" in kinds or "Replace" in kinds:
        to_bytes, to_first = _sentencepiece(steps)
    elif "ByteLevel" not in kinds:
        raise _unknown(f"its decoder is {' and '.join(kinds) or 'missing'}", where)
    size = backend.get_vocab_size(with_added_tokens=True)
    ids = backend.get_vocab(with_added_tokens=True)
    size = max(size, max(ids.values(), default=-1) + 1)

    def table(of: _ToBytes) -> list[bytes | None]:
        tokens: list[bytes | None] = [None] * size
        for token, number in ids.items():
            if token not in special:
                tokens[number] = of(token)
        return tokens

    vocabulary = Vocabulary(table(to_bytes), table(to_first) if to_first else None)
    _compare(vocabulary, backend, where)
    return vocabulary


def _decoder_steps(decoder: dict[str, Any] | None) -> list[dict[str, Any]]:
    if decoder is None:
        return []
    return decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]


def _byte_alphabet() -> dict[str, int]:
    """GPT-2's letters for bytes: printable ones of Latin-1 stand for themselves, all others for U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {chr(byte): byte for byte in printable}
    return letters | {chr(0x100 + i): byte for i, byte in enumerate(others)}


_LETTERS = _byte_alphabet()


def _byte_level(token: str) -> bytes:
    # A token with any other letter was added as it is, and the decoder takes it so.
    if all(letter in _LETTERS for letter in token):
        return bytes(_LETTERS[letter] for letter in token)
    return token.encode()


def _sentencepiece(steps: list[dict[str, Any]]) -> tuple[_ToBytes, _ToBytes | None]:
    """What tokens are anywhere, and as the first ones of an answer where that is something else."""
    fallback = any(step["type"] == "ByteFallback" for step in steps)
    strips = any(step["type"] == "Strip" and step["content"] == " " and step["start"] == 1 for step in steps)
    dropped = ""
    replaced = [
        (step["pattern"]["String"], step["content"])
        for step in steps
        if step["type"] == "Replace" and "String" in step["pattern"]
    ]
    for step in steps:
        if step["type"] == "Metaspace":
            replaced.append((step["replacement"], " "))
            if step.get("prepend_scheme", "always") != "never":
                dropped = step["replacement"]

    def to_bytes(token: str) -> bytes:
        for old, new in replaced:
            token = token.replace(old, new)
        if fallback and (match := _BYTE_TOKEN.fullmatch(token)):
            return bytes([int(match[1], 16)])
        return token.encode()

    def without_space(token: str) -> bytes:
        data = to_bytes(token.replace(dropped, "") if dropped else token)
        return data[1:] if strips and data.startswith(b" ") else data

    return to_bytes, without_space if strips or dropped else None


def _compare(vocabulary: Vocabulary, backend: Any, where: str) -> None:
    """Random answers of valid UTF-8 through the tokenizer's own decoder."""
    whole = [i for i, token in enumerate(vocabulary.tokens) if token and _is_text(token)]
    if not whole:
        raise _unknown("none of its tokens is text", where)
    generator = np.random.default_rng(0)
    samples: list[NDArray[np.int64]] = [generator.choice(whole, 12) for _ in range(_TRIES)]
    answers = [[int(i) for i in sample] for sample in samples]
    for answer, text in zip(answers, backend.decode_batch(answers, skip_special_tokens=True), strict=True):
        if vocabulary.text(answer) != text.encode():
            raise _unknown(f"it decodes the tokens {answer[:4]} in its own way", where)


def _is_text(token: bytes) -> bool:
    try:
        token.decode()
    except UnicodeDecodeError:
        return False
    return True


def _unknown(what: str, where: str) -> ModelError:
    return ModelError(
        f"the bytes of the tokenizer's tokens are not known ({what})",
        where,
        "leave answer.schema, regex and choices out, or use a model with a byte-level BPE or SentencePiece tokenizer",
    )
