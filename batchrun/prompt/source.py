"""Where a prompt comes from: a text sent as it is, or messages through a chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import pyarrow as pa

from batchrun.errors import FaultCode, ModelError, RowFault
from batchrun.job.settings import PromptSettings
from batchrun.prompt.columns import (
    Message,
    check_prompt_column,
    conversations,
    holds_messages,
    values,
)
from batchrun.prompt.renderer import RENDERER
from batchrun.prompt.template import check_columns, check_templates, prompt_columns, row_templates

# Drops a number of units (bytes or tokens) from a text.
Drop = Callable[[str, int], str]
# Marks what a row value spells and must stay text.
Guard = Callable[[Any], Any]


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

    def shorten(self, row: Any, excess: int, drop: Drop) -> Any | None:
        """The row about `excess` units shorter; None when nothing is left that may be cut."""
        ...


def open_source(settings: PromptSettings, tokenizer: Any, schema: pa.Schema, guard: Guard) -> PromptSource:
    """The source that the job's prompt section describes. Every value of a row goes through `guard`.

    Raises:
        JobError: a template that cannot be compiled.
        InputError: columns that the schema lacks, or a ready column of another type.
        ModelError: messages, and no chat template anywhere, or one that leaves some of them out.
    """
    check_columns(settings, schema)
    if settings.column is not None:
        kind = schema.field(settings.column).type
        check_prompt_column(settings.column, kind)
        if not holds_messages(kind):
            return TextSource(settings, guard)
    elif settings.template is not None:
        return TextSource(settings, guard)
    source = ChatSource(settings, tokenizer, guard)
    source.refuse_lost_messages()
    return source


class TextSource:
    """A row is its text, from a template or a ready column."""

    special_tokens = True

    def __init__(self, settings: PromptSettings, guard: Guard) -> None:
        self.column, self.guard = settings.column, guard
        self.template = _Templates(settings, guard)

    def rows(self, batch: pa.RecordBatch) -> list[str | RowFault]:
        """See `PromptSource`: a row is its text."""
        if self.column is not None:
            column = values(batch.column(self.column))
            return [_null(self.column) if v is None else self.guard(v) for v in column]
        return [row if isinstance(row, RowFault) else row[0] for row in self.template.render(batch)]

    def texts(self, rows: list[str]) -> list[str | RowFault]:
        """The rows themselves."""
        return [*rows]

    def is_empty(self, row: str) -> bool:
        """Whether there is no text."""
        return not row

    def shorten(self, row: str, excess: int, drop: Drop) -> str | None:
        """The text cut by `drop`."""
        return drop(row, excess) or None


class ChatSource:
    """A row is a conversation, from message templates or a ready column of role and content structs.

    It is cut where it is too long in its longest user message (its longest message, when no user speaks): the
    chat template's own tokens and the other messages stay whole.
    """

    special_tokens = False  # the chat template writes them itself

    def __init__(self, settings: PromptSettings, tokenizer: Any, guard: Guard) -> None:
        self.column, self.guard = settings.column, guard
        self.roles = [message.role for message in settings.messages or []]
        self.templates = _Templates(settings, guard)
        self.named_tokens = tokenizer.special_tokens_map
        try:
            self.chat_template = tokenizer.get_chat_template(settings.chat_template)
        except ValueError:
            raise ModelError(
                "the tokenizer has no chat template, and the prompt is made of messages",
                "prompt",
                "set prompt.chat_template, use prompt.template, or another model",
            ) from None

    def refuse_lost_messages(self) -> None:
        """Raises ModelError where the chat template writes nothing for a role, as many do for one they do not know."""
        row: list[Message] = [
            {"role": role, "content": f"content-{i}-of-{role}"} for i, role in enumerate(self.roles)
        ]
        text = self.texts([row])[0]
        if isinstance(text, RowFault):
            return  # rows will say so, with their own contents
        for message in row:
            if message["content"] not in text:
                raise ModelError(
                    f"the chat template leaves out messages of the role {message['role']!r}",
                    "prompt.messages",
                    "use a role that it knows: system, user or assistant as a rule",
                )

    def rows(self, batch: pa.RecordBatch) -> list[list[Message] | RowFault]:
        """See `PromptSource`: a row is a conversation."""
        if self.column is not None:
            column = conversations(batch.column(self.column))
            return [_null(self.column) if row is None else self.guard(row) for row in column]
        return [
            row
            if isinstance(row, RowFault)
            else [{"role": role, "content": text} for role, text in zip(self.roles, row, strict=True)]
            for row in self.templates.render(batch)
        ]

    def texts(self, rows: list[list[Message]]) -> list[str | RowFault]:
        """The conversations as the chat template writes them, or its fault."""
        return RENDERER.chats(self.chat_template, self.named_tokens, rows)

    def is_empty(self, row: list[Message]) -> bool:
        """Whether no user says anything."""
        return not any(message["content"] for message in _asking(row))

    def shorten(self, row: list[Message], excess: int, drop: Drop) -> list[Message] | None:
        """The conversation with its longest message cut by `drop`."""
        longest = max(_asking(row), key=lambda message: len(message["content"]))
        if not longest["content"]:
            return None
        cut = {**longest, "content": drop(longest["content"], excess)}
        return [cut if message is longest else message for message in row]


def _asking(row: list[Message]) -> list[Message]:
    return [message for message in row if message["role"] == "user"] or row


def _null(column: str) -> RowFault:
    return RowFault(FaultCode.NULL_PROMPT, f"column {column!r} is null")


class _Templates:
    """The job's templates over the columns that they read."""

    def __init__(self, settings: PromptSettings, guard: Guard) -> None:
        templates = row_templates(settings)
        check_templates(templates)
        self.sources, self.columns = [t.source for t in templates], prompt_columns(settings)
        self.guard = guard

    def render(self, batch: pa.RecordBatch) -> list[list[str] | RowFault]:
        """(rows,) A row's texts, one per template, or its fault."""
        columns = [map(self.guard, values(batch.column(name))) for name in self.columns]
        rows: list[Any] = [*zip(*columns, strict=True)] if columns else [()] * batch.num_rows
        faults = {i: fault for i, row in enumerate(rows) if (fault := _fault(row)) is not None}
        good = [row for i, row in enumerate(rows) if i not in faults] if faults else rows
        rendered = iter(RENDERER.rows(self.sources, self.columns, good))
        return [faults[i] if i in faults else next(rendered) for i in range(len(rows))]


def _fault(row: Sequence[Any]) -> RowFault | None:
    return next((value for value in row if isinstance(value, RowFault)), None)
