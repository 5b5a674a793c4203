"""Rows to token ids that fit the model, or to the fault that keeps them from it."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from batchrun.engine.protocol import TokenIds
from batchrun.errors import FaultCode, InputError, JobError, RowFault
from batchrun.job.settings import PromptSettings
from batchrun.prompt.encoder import Encoder
from batchrun.prompt.source import open_source
from batchrun.prompt.template import prompt_columns


class PromptBuilder:
    """Makes prompts of record batches. `columns` are the ones it reads.

    A prompt has at most `context - max_new_tokens` tokens and at most `settings.max_bytes` bytes of text. A
    longer one is its row's fault, or is cut on the side `settings.truncate`: a text loses its first or last
    tokens (the tokenizer's special tokens stay), a conversation those of its longest user message.

    Raises:
        JobError: a template with a syntax error, or no room for any prompt.
        InputError: columns that the schema lacks, or a ready column that is neither text nor messages.
        ModelError: messages, and no chat template anywhere.
    """

    def __init__(
        self, settings: PromptSettings, tokenizer: Any, context: int, max_new_tokens: int, schema: pa.Schema
    ) -> None:
        self.columns = prompt_columns(settings)
        self._settings, self._tokenizer = settings, tokenizer
        self._context, self._room = context, context - max_new_tokens
        if self._room < 1:
            raise JobError(
                f"{max_new_tokens} new tokens leave no room for a prompt in the model's {context}",
                "generation.max_new_tokens",
                f"set it below {context}",
            )
        self._source = open_source(settings, tokenizer, schema)
        self._encoder = Encoder(tokenizer)

    def render(self, batch: pa.RecordBatch) -> list[str | RowFault]:
        """(rows,) The whole texts that are to be tokenized, before any limit, or the rows' faults."""
        return [row if isinstance(row, RowFault) else self._text(row) for row in self._source.rows(batch)]

    def build(self, batch: pa.RecordBatch) -> list[TokenIds | RowFault]:
        """(rows,) int32 arrays of token ids, never empty, each with room for the new tokens, or the rows'
        faults."""
        rows = self._source.rows(batch)
        built: list[Any] = [row if isinstance(row, RowFault) else self._text(row) for row in rows]
        for i, text in enumerate(built):
            # A short text in ASCII, as most are, is known to be good without a copy of it.
            if isinstance(text, str) and (len(text) > self._settings.max_bytes or not text.isascii()):
                rows[i], built[i] = self._bounded(rows[i], text)
        texts = [i for i, text in enumerate(built) if isinstance(text, str)]
        encoded = self._encoder.encode([built[i] for i in texts], self._source.special_tokens)
        for i, ids in zip(texts, encoded, strict=True):
            built[i] = self._fitted(rows[i], ids)
        return built

    def _text(self, row: Any) -> str | RowFault:
        if self._settings.empty == "fail" and self._source.is_empty(row):
            return RowFault(FaultCode.EMPTY_PROMPT, "the prompt is empty")
        return self._source.text(row)

    def _bounded(self, row: Any, text: str) -> tuple[Any, str | RowFault]:
        """The row and its text cut to `max_bytes`: a longer one never reaches the tokenizer."""
        limit, side = self._settings.max_bytes, self._settings.truncate
        try:
            size = len(text.encode())
        except UnicodeEncodeError as error:  # an escape in a template wrote half of a surrogate pair
            return row, RowFault(FaultCode.INVALID_UTF8, str(error))
        if size <= limit:
            return row, text
        fault = RowFault(FaultCode.PROMPT_TOO_LONG, f"{size} bytes, and prompt.max_bytes is {limit}")
        if side is None:
            return row, fault
        while size > limit:
            row = self._source.shorten(row, size - limit, partial(_drop_bytes, side=side))
            if row is None:
                return row, fault
            shorter = self._source.text(row)
            if isinstance(shorter, RowFault):
                return row, shorter
            text, size = shorter, len(shorter.encode())
        return row, text

    def _fitted(self, row: Any, ids: TokenIds) -> TokenIds | RowFault:
        if len(ids) > self._room:
            return self._truncated(row, ids)
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

    def _truncated(self, row: Any, ids: TokenIds) -> TokenIds | RowFault:
        side = self._settings.truncate
        fault = RowFault(
            FaultCode.PROMPT_TOO_LONG,
            f"{len(ids)} tokens, and {self._room} fit (context {self._context}, "
            f"{self._context - self._room} new tokens)",
        )
        if side is None:
            return fault
        if self._source.special_tokens:
            return self._cut(ids, side) if sum(self._encoder.frame) < self._room else fault
        while len(ids) > self._room:
            row = self._source.shorten(row, len(ids) - self._room, partial(self._encoder.drop, side=side))
            if row is None:
                return fault
            text = self._source.text(row)
            if isinstance(text, RowFault):
                return text
            ids = self._encoder.encode([text], False)[0]
        return ids

    def _cut(self, ids: TokenIds, side: str) -> TokenIds:
        before, after = self._encoder.frame
        inner, keep = ids[before : len(ids) - after], self._room - before - after
        kept = inner[-keep:] if side == "left" else inner[:keep]
        return np.concatenate([ids[:before], kept, ids[len(ids) - after :]])


def check_sample(builder: PromptBuilder, batches: Iterable[pa.RecordBatch], rows: int = 100) -> None:
    """Tries the first `rows` rows while planning: a wrong template is found before a GPU is asked for.

    Raises:
        InputError: more than half of them fail; shows three.
    """
    seen, faults = 0, []
    for batch in batches:
        head = builder.build(batch.slice(0, rows - seen))
        faults += [(seen + i, fault) for i, fault in enumerate(head) if isinstance(fault, RowFault)]
        seen += len(head)
        if seen >= rows:
            break
    if len(faults) * 2 > seen:
        shown = "; ".join(f"row {i}: {fault}" for i, fault in faults[:3])
        raise InputError(
            f"{len(faults)} of the first {seen} rows have no prompt ({shown})",
            "prompt",
            "check the template and the data",
        )


def _drop_bytes(text: str, count: int, side: str) -> str:
    data = text.encode()
    kept = data[count:] if side == "left" else data[: max(0, len(data) - count)]
    return kept.decode("utf-8", "ignore")
