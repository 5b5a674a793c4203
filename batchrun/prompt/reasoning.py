"""What a reasoning model thinks before it answers: the markers around it, and an answer taken apart at them."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from batchrun.engine.protocol import TokenIds
from batchrun.errors import ModelError
from batchrun.prompt.detokenizer import Detokenizer

# Opening and closing, as models ship them: Qwen3, DeepSeek-R1 and most others; Magistral; Command A; gpt-oss.
KNOWN = (
    ("<think>", "</think>"),
    ("[THINK]", "[/THINK]"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
)
# The parts of a marker that a tokenizer has tokens for, where it was made for it.
_TOKENS = re.compile(r"<[^<>]+>|\[[^\[\]]+\]")


@dataclass(frozen=True, slots=True)
class Marker:
    """A marker's text and its token ids. `exact`: whatever text is around it, it is these very tokens."""

    text: str
    token_ids: tuple[int, ...]
    exact: bool

    @classmethod
    def of(cls, text: str, tokenizer: Any) -> Marker:
        """The marker as the tokenizer spells it."""
        added = tokenizer.get_added_vocab()
        if text in added:
            return cls(text, (added[text],), True)
        ids = tuple(tokenizer.encode(text, add_special_tokens=False))
        # Nothing merges with an added token: the tokens of all that is between two of them are always the same.
        edges = {ids[0], ids[-1]} if ids else {None}
        return cls(text, ids, edges <= set(added.values()))


@dataclass(frozen=True, slots=True)
class Parts:
    """An answer taken apart. `reasoning` is None where there was none, `answer` where it was cut before it came to
    one. `tokens` are those up to the end of the closing marker."""

    reasoning: str | None
    answer: str | None
    tokens: int


@dataclass(frozen=True)
class Reasoning:
    """Between `opening` and `closing` a model thinks; what comes after that is its answer.

    A constraint on the answer (a schema) begins to hold behind the tokens of `closing`, or at once where the model
    begins to answer without having thought. `of_tokens`: the markers are these very tokens, the opening one the first
    of all, and the same text in other tokens is none. `keeps_space`: white space before an answer is part of it.
    """

    opening: Marker
    closing: Marker
    detokenizer: Detokenizer
    of_tokens: bool = False
    keeps_space: bool = False

    def is_begun(self, text: str, begun: str | None) -> bool:
        """Whether the model, going on with a prompt's `text`, is thinking already.

        Either the chat template opens that (the prompt ends with the marker), or a message that is to be continued,
        of which `begun` is there, has. The marker in anything else, such as what a user says, means nothing.
        """
        if begun is None:
            return text.rstrip().endswith(self.opening.text)
        return begun.rfind(self.opening.text) > begun.rfind(self.closing.text)

    def is_over(self, text: str, begun: str | None) -> bool:
        """Whether the model, going on with a prompt's `text`, is beyond thinking: it has done so there, or a message
        that is to be continued has text already."""
        if begun is not None and begun.strip():
            return not self.is_begun(text, begun)
        return text.rstrip().endswith(self.closing.text)

    def take_apart(self, token_ids: TokenIds, is_begun: bool, stop: Sequence[str] | None = None) -> Parts:
        """The parts of an answer's (length,) token ids, without white space around the reasoning and before the answer.

        A marker elsewhere than at its beginning is part of the answer. `stop` are the row's own stop texts.
        """
        stops = None if stop is None else [stop]
        if not is_begun and not self._opens(token_ids):
            return Parts(None, self.detokenizer.decode([token_ids], stops)[0], 0)
        end = self._end(token_ids)
        thought = self.detokenizer.decode_whole(token_ids[:end])
        head, closing, tail = thought.partition(self.closing.text)
        reasoning = head.lstrip().removeprefix(self.opening.text).strip()
        if not closing:
            return Parts(self.detokenizer.before_stop(reasoning, stop).strip(), None, len(token_ids))
        # A token may hold the end of a marker made of ordinary text and what comes after it.
        answer = tail + self.detokenizer.decode([token_ids[end:]], stops)[0]
        return Parts(reasoning, answer if self.keeps_space else answer.lstrip(), end)

    def _opens(self, token_ids: TokenIds) -> bool:
        if self.of_tokens:
            wanted = self.opening.token_ids
            return tuple(token_ids[: len(wanted)].tolist()) == wanted
        # White space may come first, and a token is a character at least.
        head = self.detokenizer.decode_whole(token_ids[: 2 * len(self.opening.text)])
        return head.lstrip().startswith(self.opening.text)

    def _end(self, token_ids: TokenIds) -> int:
        """How many tokens there are up to the end of the first closing marker; all of them without one."""
        wanted = self.closing.token_ids
        if self.closing.exact:
            matches = np.ones(max(0, len(token_ids) - len(wanted) + 1), bool)
            for i, token in enumerate(wanted):
                matches &= token_ids[i : i + len(matches)] == token
            found = np.flatnonzero(matches)
            return int(found[0]) + len(wanted) if len(found) else len(token_ids)
        return bisect_left(
            range(len(token_ids)),
            True,
            key=lambda end: self.closing.text in self.detokenizer.decode_whole(token_ids[:end]),
        )


def find_reasoning(markers: Sequence[str] | None, tokenizer: Any, detokenizer: Detokenizer) -> Reasoning:
    """The reasoning between `markers`, or between those that the tokenizer or its chat template has.

    Raises:
        ModelError: neither has any that is known.
    """
    opening, closing = markers or _known_markers(tokenizer)
    return Reasoning(Marker.of(opening, tokenizer), Marker.of(closing, tokenizer), detokenizer)


def _known_markers(tokenizer: Any) -> tuple[str, str]:
    vocabulary = tokenizer.get_added_vocab()
    for opening, closing in KNOWN:
        if all(token in vocabulary for marker in (opening, closing) for token in _TOKENS.findall(marker)):
            return opening, closing
    templates = tokenizer.chat_template or ""
    text = "\n".join(templates.values()) if isinstance(templates, dict) else templates
    for opening, closing in KNOWN:
        if closing in text:
            return opening, closing
    raise ModelError(
        "neither the tokenizer nor its chat template has markers of reasoning that are known "
        f"({', '.join(opening for opening, _ in KNOWN)})",
        "answer.reasoning",
        "leave it out, or set answer.reasoning_markers: [opening, closing]",
    )
