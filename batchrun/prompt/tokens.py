"""Rows to token ids that fit the model, or to the fault that keeps them from it."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from batchrun.engine.protocol import TokenIds
from batchrun.errors import FaultCode, InputError, JobError, RowFault
from batchrun.job.generation import RowSettings
from batchrun.job.prompt import PromptSettings
from batchrun.prompt.encoder import Encoder
from batchrun.prompt.reasoning import Reasoning
from batchrun.prompt.renderer import KILLED, killed
from batchrun.prompt.row_settings import RowSettingsReader
from batchrun.prompt.scoring import Behind, Scoring
from batchrun.prompt.source import open_source
from batchrun.prompt.special import MARK, Guarded, cut
from batchrun.prompt.template import prompt_columns

# A sample is tried a few rows at a time, and no longer than this once most of them fail.
SAMPLE_ROWS, SAMPLE_SECONDS = 4, 4.0
_TOO_LONG_FIX = (
    "set prompt.truncate: right, or fewer generation.max_new_tokens, or use a model with a longer context"
)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A row's int32 token ids, whether the model is thinking already where they end, the row's own settings, None in a
    job whose rows have none, what is scored behind the tokens, and whether the model is beyond thinking."""

    token_ids: TokenIds
    is_reasoning: bool
    settings: RowSettings | None = None
    behind: Behind | None = None
    is_answering: bool = False

    @property
    def adapter(self) -> int:
        """The row's among those of the model, counted from 1; 0 is none."""
        return 0 if self.settings is None else self.settings.adapter


class PromptBuilder:
    """Makes prompts of record batches. `columns` are the ones it reads.

    A prompt has at most `context - max_new_tokens` tokens (the row's own, where `own` reads them) and at most
    `settings.max_bytes` bytes of text. A longer one is its row's fault, or is cut on the side `settings.truncate`: a
    text loses its first or last tokens (the tokenizer's special tokens stay), a conversation those of its longest user
    message.

    Raises:
        JobError: a template with a syntax error, or no room for any prompt.
        InputError: columns that the schema lacks, or a ready column that is neither text nor messages.
        ModelError: messages, and no chat template anywhere.
    """

    def __init__(
        self,
        settings: PromptSettings,
        tokenizer: Any,
        context: int,
        max_new_tokens: int,
        schema: pa.Schema,
        reasoning: Reasoning | None = None,
        own: RowSettingsReader | None = None,
        scoring: Scoring | None = None,
    ) -> None:
        columns = [
            *prompt_columns(settings),
            *(own.columns if own else []),
            *(scoring.columns if scoring else []),
        ]
        self.columns = list(dict.fromkeys(columns))
        self._own, self._scoring = own, scoring
        self._settings, self._tokenizer, self._reasoning = settings, tokenizer, reasoning
        self._context, self._room = context, context - max_new_tokens
        if self._room < 1:
            raise JobError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's {context}",
                "generation.max_new_tokens",
                f"set it below {context}",
            )
        self._encoder = Encoder(tokenizer)
        guard = self._encoder.special.guard if settings.special_tokens == "text" else unguarded
        self._source = open_source(settings, tokenizer, schema, guard)

    @property
    def is_scored(self) -> bool:
        """Whether something is scored behind each prompt, and nothing generated."""
        return self._scoring is not None

    def render(self, batch: pa.RecordBatch) -> list[str | RowFault]:
        """(rows,) The whole texts that are to be tokenized, before any limit, or the rows' faults."""
        return self._texts(self._source.rows(batch))

    def build(self, batch: pa.RecordBatch) -> list[TokenIds | RowFault]:
        """(rows,) int32 arrays of token ids, never empty, each with room for the new tokens, or the rows'
        faults."""
        return [
            prompt if isinstance(prompt, RowFault) else prompt.token_ids for prompt in self.prompts(batch)
        ]

    def prompts(self, batch: pa.RecordBatch) -> list[Prompt | RowFault]:
        """(rows,) The same, with what an answer needs to know of its prompt."""
        rows = self._source.rows(batch)
        own = [] if self._own is None else self._own.read(batch)
        for i, one in enumerate(own):
            if isinstance(one, RowFault) and not isinstance(rows[i], RowFault):
                rows[i] = one
        built: list[Any] = self._texts(rows)
        behind: list[Any] = [None] * len(rows) if self._scoring is None else self._scoring.behind(batch)
        for i, text in enumerate(built):
            # A short text in ASCII, as most are, is known to be good without a copy of it.
            if isinstance(text, str) and (len(text) > self._settings.max_bytes or not text.isascii()):
                rows[i], built[i] = self._bounded(rows[i], text)
        texts = [i for i, text in enumerate(built) if isinstance(text, str)]
        encoded = self._encoder.encode([built[i] for i in texts], self._source.special_tokens)
        for i, ids in zip(texts, encoded, strict=True):
            if isinstance(behind[i], RowFault):
                built[i] = behind[i]
                continue
            settings = own[i] if own else None
            assert not isinstance(settings, RowFault)
            fitted = self._fitted(rows[i], ids, self._room_of(settings, behind[i]))
            if isinstance(fitted, RowFault):
                built[i] = fitted
            else:
                thinks, answers = self._reasoned(rows[i], built[i])
                built[i] = Prompt(fitted, thinks, settings, behind[i], answers)
        return built

    def _room_of(self, settings: RowSettings | None, behind: Behind | None) -> int:
        """Tokens that a row's prompt may have."""
        if behind is not None:
            return self._context - behind.room
        return self._room if settings is None else self._context - settings.max_new_tokens

    def _reasoned(self, row: Any, text: str) -> tuple[bool, bool]:
        """Whether the model is thinking where the prompt ends, and whether it has done so."""
        if self._reasoning is None:
            return False, False
        begun = self._source.begun(row)
        return self._reasoning.is_begun(text, begun), self._reasoning.is_over(text, begun)

    def _texts(self, rows: list[Any]) -> list[str | RowFault]:
        texts: list[Any] = [row if isinstance(row, RowFault) else self._empty(row) for row in rows]
        sent = [i for i, fault in enumerate(texts) if fault is None]
        for i, text in zip(sent, self._sent([rows[i] for i in sent]), strict=True):
            texts[i] = text
        return texts

    def _sent(self, rows: list[Any]) -> list[str | RowFault]:
        texts = self._source.texts(rows)
        return [Guarded.of(t) if isinstance(t, str) and MARK in t else t for t in texts]

    def _empty(self, row: Any) -> RowFault | None:
        if self._settings.empty == "fail" and self._source.is_empty(row):
            return RowFault(FaultCode.EMPTY_PROMPT, "the prompt is empty")
        return None

    def _shorter(self, row: Any, excess: int, drop: Any) -> tuple[Any, str | RowFault | None]:
        """The row about `excess` units shorter and its text; None where nothing is left that may be cut."""
        side = self._settings.truncate
        assert side is not None

        def dropped(text: str, count: int) -> str:
            return cut(text, drop(text.replace(MARK, ""), count, side=side), side)

        row = self._source.shorten(row, excess, dropped)
        return row, None if row is None else self._sent([row])[0]

    def _bounded(self, row: Any, text: str) -> tuple[Any, str | RowFault]:
        """The row and its text cut to `max_bytes`: a longer one never reaches the tokenizer."""
        limit, side = self._settings.max_bytes, self._settings.truncate
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:
            # An escape in a template wrote half of a surrogate pair.
            return row, RowFault(FaultCode.INVALID_UTF8, str(error))
        if size <= limit:
            return row, text
        fault = RowFault(FaultCode.PROMPT_TOO_LONG, f"{size} bytes, and prompt.max_bytes is {limit}")
        if side is None:
            return row, fault
        while size > limit:
            row, shorter = self._shorter(row, size - limit, _drop_bytes)
            if not isinstance(shorter, str):
                return row, shorter or fault
            text, size = shorter, len(shorter.encode())
        return row, text

    def _fitted(self, row: Any, ids: TokenIds, room: int) -> TokenIds | RowFault:
        if len(ids) > room:
            return self._truncated(row, ids, room)
        bare = sum(self._encoder.frame) if self._source.special_tokens else 0
        if len(ids) <= bare and self._settings.empty == "fail":
            return RowFault(FaultCode.EMPTY_PROMPT, "the prompt has no tokens")
        if len(ids) == 0:
            bos = self._tokenizer.bos_token_id
            if bos is None:
                return RowFault(
                    FaultCode.EMPTY_PROMPT, "the prompt has no tokens, and the tokenizer no bos token"
                )
            return np.array([bos], dtype=np.int32)
        return ids

    def _truncated(self, row: Any, ids: TokenIds, room: int) -> TokenIds | RowFault:
        side = self._settings.truncate
        fault = RowFault(
            FaultCode.PROMPT_TOO_LONG,
            f"{len(ids)} tokens, and {max(0, room)} fit (context {self._context}, "
            f"{self._context - room} {'new' if self._scoring is None else 'scored'} tokens)",
        )
        if side is None:
            return fault
        if self._source.special_tokens:
            return self._cut(ids, side, room) if sum(self._encoder.frame) < room else fault
        while len(ids) > room:
            row, text = self._shorter(row, len(ids) - room, self._encoder.drop)
            if not isinstance(text, str):
                return text or fault
            ids = self._encoder.encode([text], False)[0]
        return ids

    def _cut(self, ids: TokenIds, side: str, room: int) -> TokenIds:
        before, after = self._encoder.frame
        inner, keep = ids[before : len(ids) - after], room - before - after
        kept = inner[-keep:] if side == "left" else inner[:keep]
        return np.concatenate([ids[:before], kept, ids[len(ids) - after :]])


def check_sample(builder: PromptBuilder, batches: Iterable[pa.RecordBatch], rows: int = 100) -> None:
    """Tries the first `rows` rows while planning: a wrong template is found before a GPU is asked for.

    Raises:
        InputError: more than half of them fail, or of those tried in the first seconds; shows three.
        BatchrunError: more than half of them fail because the process that renders them is killed.
    """
    seen, faults, started = 0, [], time.monotonic()
    for piece in _pieces(batches, rows):
        head = builder.build(piece)
        faults += [(seen + i, fault) for i, fault in enumerate(head) if isinstance(fault, RowFault)]
        seen += len(head)
        # Rows are only this slow where each of them runs into the limits of rendering.
        if len(faults) * 2 > seen and time.monotonic() - started > SAMPLE_SECONDS:
            break
    if sum(fault.message == KILLED for _, fault in faults) * 2 > seen:
        raise killed()
    if len(faults) * 2 > seen:
        shown = "; ".join(f"row {i}: {fault}" for i, fault in faults[:3])
        too_long = sum(fault.code is FaultCode.PROMPT_TOO_LONG for _, fault in faults)
        raise InputError(
            f"{len(faults)} of the first {seen} rows have no prompt ({shown})",
            "prompt",
            _TOO_LONG_FIX if too_long * 2 > len(faults) else "check the template and the data",
        )


def _pieces(batches: Iterable[pa.RecordBatch], rows: int) -> Iterator[pa.RecordBatch]:
    """The first `rows` rows, a few at a time."""
    for batch in batches:
        for first in range(0, min(rows, batch.num_rows), SAMPLE_ROWS):
            yield batch.slice(first, min(SAMPLE_ROWS, rows - first))
        rows -= batch.num_rows
        if rows <= 0:
            return


def unguarded(value: Any) -> Any:
    """The value, which may spell special tokens and become them."""
    return value


def _drop_bytes(text: str, count: int, side: str) -> str:
    data = text.encode()
    kept = data[count:] if side == "left" else data[: max(0, len(data) - count)]
    return kept.decode("utf-8", "ignore")
