"""Where a prompt comes from: a text sent as it is, or messages through a chat template."""

from __future__ import annotations

from typing import Any, Protocol

import pyarrow as pa

from batchrun.errors import JobError, RowFault
from batchrun.job.prompt import PromptSettings
from batchrun.prompt.chat import ChatSource
from batchrun.prompt.columns import check_prompt_column, holds_messages, null_prompt, values
from batchrun.prompt.template import Drop, Guard, Templates, check_columns


class PromptSource(Protocol):
    """A row is whatever `rows` gives and the other methods take: a text, or a conversation."""

    special_tokens: bool

    def rows(self, batch: pa.RecordBatch) -> list[Any]:
        """(rows,) rows, or the faults that keep them from being one."""
        ...

    def texts(self, rows: list[Any]) -> list[str | RowFault]:
        """(rows,) What the tokenizer gets."""
        ...

    def is_empty(self, row: Any) -> bool:
        """Whether the row asks nothing."""
        ...

    def begun(self, row: Any) -> str | None:
        """What there is of the answer already, where the prompt is one that the model goes on with; else None."""
        ...

    def shorten(self, row: Any, excess: int, drop: Drop) -> Any | None:
        """The row about `excess` units shorter; None when nothing is left that may be cut."""
        ...


def open_source(settings: PromptSettings, tokenizer: Any, schema: pa.Schema, guard: Guard) -> PromptSource:
    """The source that the job's prompt section describes. Every value of a row goes through `guard`.

    Raises:
        JobError: a template that cannot be compiled.
        InputError: columns that the schema lacks, or a ready column of another type.
        ModelError: messages, and no chat template anywhere, or one that leaves some of them or the tools out.
    """
    check_columns(settings, schema)
    if settings.column is not None:
        kind = schema.field(settings.column).type
        check_prompt_column(settings.column, kind)
        if not holds_messages(kind):
            _refuse_chat_settings(settings)
            return TextSource(settings, guard)
    elif settings.template is not None:
        return TextSource(settings, guard)
    return ChatSource(settings, tokenizer, schema, guard)


def _refuse_chat_settings(settings: PromptSettings) -> None:
    for name in ("template_kwargs", "tools"):
        if getattr(settings, name):
            raise JobError(
                f"it is for the chat template, and column {settings.column!r} holds text, which goes through none",
                f"prompt.{name}",
                "leave it out, or use prompt.messages over the column",
            )


class TextSource:
    """A row is its text, from a template or a ready column."""

    special_tokens = True

    def __init__(self, settings: PromptSettings, guard: Guard) -> None:
        self.column, self.guard = settings.column, guard
        self.template = Templates(settings, guard)

    def rows(self, batch: pa.RecordBatch) -> list[str | RowFault]:
        """See `PromptSource`: a row is its text."""
        if self.column is not None:
            column = values(batch.column(self.column))
            return [null_prompt(self.column) if v is None else self.guard(v) for v in column]
        return [row if isinstance(row, RowFault) else row[0] for row in self.template.render(batch)]

    def texts(self, rows: list[str]) -> list[str | RowFault]:
        """The rows themselves."""
        return [*rows]

    def is_empty(self, row: str) -> bool:
        """Whether there is no text."""
        return not row

    def begun(self, row: str) -> str | None:
        """None: a text is a prompt, and no answer."""
        return None

    def shorten(self, row: str, excess: int, drop: Drop) -> str | None:
        """The text cut by `drop`."""
        return drop(row, excess) or None
