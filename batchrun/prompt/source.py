"""Where a prompt comes from: a text sent as it is, or messages through a chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterable
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
from batchrun.prompt.template import NULL, check_columns, prompt_columns, row_templates

# Drops a number of units (bytes or tokens) from a text.
Drop = Callable[[str, int], str]


class PromptSource(Protocol):
    """A row is whatever `rows` gives and the other methods take: a text, or a conversation."""

    special_tokens: bool

    def rows(self, batch: pa.RecordBatch) -> list[Any]:
        """(rows,) rows, or the faults that keep them from being one."""
        ...

    def text(self, row: Any) -> str | RowFault:
        """What the tokenizer gets."""
        ...

    def is_empty(self, row: Any) -> bool: ...

    def shorten(self, row: Any, excess: int, drop: Drop) -> Any | None:
        """The row about `excess` units shorter; None when nothing is left that may be cut."""
        ...


def open_source(settings: PromptSettings, tokenizer: Any, schema: pa.Schema) -> PromptSource:
    """The source that the job's prompt section describes.

    Raises:
        JobError: a template with a syntax error.
        InputError: columns that the schema lacks, or a ready column of another type.
        ModelError: messages, and no chat template anywhere, or one that leaves some of them out.
    """
    check_columns(prompt_columns(settings), schema)
    if settings.column is not None:
        kind = schema.field(settings.column).type
        check_prompt_column(settings.column, kind)
        if not holds_messages(kind):
            return TextSource(settings)
    elif settings.template is not None:
        return TextSource(settings)
    source = ChatSource(settings, tokenizer)
    source.refuse_lost_messages()
    return source


class TextSource:
    """A row is its text, from a template or a ready column."""

    special_tokens = True

    def __init__(self, settings: PromptSettings) -> None:
        self.column = settings.column
        self.templates = row_templates(settings)

    def rows(self, batch: pa.RecordBatch) -> list[str | RowFault]:
        if self.column is not None:
            return [_null(self.column) if v is None else v for v in values(batch.column(self.column))]
        template = self.templates[0]
        names = template.columns
        return [
            row if isinstance(row, RowFault) else template.render(row) for row in _variables(batch, names)
        ]

    def text(self, row: str) -> str:
        return row

    def is_empty(self, row: str) -> bool:
        return not row

    def shorten(self, row: str, excess: int, drop: Drop) -> str | None:
        return drop(row, excess) or None


class ChatSource:
    """A row is a conversation, from message templates or a ready column of role and content structs.

    It is cut where it is too long in its longest user message (its longest message, when no user speaks): the
    chat template's own tokens and the other messages stay whole.
    """

    special_tokens = False  # the chat template writes them itself

    def __init__(self, settings: PromptSettings, tokenizer: Any) -> None:
        self.column, self.tokenizer = settings.column, tokenizer
        self.roles = [message.role for message in settings.messages or []]
        self.templates = row_templates(settings)
        self.columns = prompt_columns(settings)
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
        text = self.text(row)
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
        if self.column is not None:
            return [
                _null(self.column) if row is None else row for row in conversations(batch.column(self.column))
            ]
        return [
            row if isinstance(row, RowFault) else self._filled(row) for row in _variables(batch, self.columns)
        ]

    def text(self, row: list[Message]) -> str | RowFault:
        try:
            text: str = self.tokenizer.apply_chat_template(
                row, chat_template=self.chat_template, tokenize=False, add_generation_prompt=True
            )
            return text
        except Exception as error:  # chat templates come with models: they may raise anything
            return RowFault(FaultCode.TEMPLATE_ERROR, f"chat template: {error}")

    def is_empty(self, row: list[Message]) -> bool:
        return not any(message["content"] for message in _asking(row))

    def shorten(self, row: list[Message], excess: int, drop: Drop) -> list[Message] | None:
        longest = max(_asking(row), key=lambda message: len(message["content"]))
        if not longest["content"]:
            return None
        cut = {**longest, "content": drop(longest["content"], excess)}
        return [cut if message is longest else message for message in row]

    def _filled(self, variables: dict[str, Any]) -> list[Message] | RowFault:
        row: list[Message] = []
        for role, template in zip(self.roles, self.templates, strict=True):
            content = template.render(variables)
            if isinstance(content, RowFault):
                return content
            row.append({"role": role, "content": content})
        return row


def _asking(row: list[Message]) -> list[Message]:
    return [message for message in row if message["role"] == "user"] or row


def _null(column: str) -> RowFault:
    return RowFault(FaultCode.NULL_PROMPT, f"column {column!r} is null")


def _variables(batch: pa.RecordBatch, names: list[str]) -> Iterable[dict[str, Any] | RowFault]:
    if not names:
        return ({} for _ in range(batch.num_rows))
    columns = [values(batch.column(name)) for name in names]
    return (_row(names, row) for row in zip(*columns, strict=True))


def _row(names: list[str], row: tuple[Any, ...]) -> dict[str, Any] | RowFault:
    variables: dict[str, Any] = {}
    for name, value in zip(names, row, strict=True):
        if isinstance(value, RowFault):
            return value
        variables[name] = NULL if value is None else value
    return variables
