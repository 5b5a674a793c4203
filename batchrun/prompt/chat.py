"""Messages through the model's chat template, with tools, variables of the template, and answers that were begun."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, replace
from typing import Any

import pyarrow as pa

from batchrun.errors import JobError, ModelError, RowFault
from batchrun.job.prompt import PromptSettings, ToolsColumn
from batchrun.prompt.columns import Message, conversations, null_prompt
from batchrun.prompt.renderer import RENDERER
from batchrun.prompt.template import Drop, Guard, Templates
from batchrun.prompt.tools import Tools, check_tools_column, tools_of

PROBE_NAME = "name_of_a_tool"
PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": PROBE_NAME,
        "description": "A tool.",
        "parameters": {"type": "object", "properties": {"x": {"type": "string", "description": "A text."}}},
    },
}
# How a list of parts looks where a template prints it as one text.
_PRINTED = re.compile(r"""['"]type['"]\s*:\s*['"]text['"]""")


@dataclass(frozen=True, slots=True)
class Chat:
    """A row: its messages, each with a text or a list of text parts as its content, and its tools."""

    messages: list[Message]
    tools: Tools | None = None


class ChatSource:
    """A row is a `Chat`, from message templates or a ready column of role and content structs.

    A last message of the assistant is one that the model goes on with (transformers' continue_final_message). A
    conversation is cut where it is too long in its longest user message (its longest message, when no user speaks), or
    the longest part of one: the chat template's own tokens and the other messages stay whole.

    Raises:
        JobError: variables that the chat template does not read.
        InputError: a column of tools that holds none.
        ModelError: no chat template anywhere, or one that leaves out messages or tools.
    """

    # The chat template writes them itself.
    special_tokens = False

    def __init__(self, settings: PromptSettings, tokenizer: Any, schema: pa.Schema, guard: Guard) -> None:
        self.column, self.guard = settings.column, guard
        self.messages = settings.messages or []
        self.templates = Templates(settings, guard)
        self.tools_column = settings.tools.column if isinstance(settings.tools, ToolsColumn) else None
        if self.tools_column is not None:
            check_tools_column(self.tools_column, schema.field(self.tools_column).type)
        self.tools: Tools | None = settings.tools if isinstance(settings.tools, list) else None
        try:
            # Some tokenizers have another one for tools.
            tools = None if settings.tools is None else [PROBE_TOOL]
            self.chat_template: str = tokenizer.get_chat_template(settings.chat_template, tools)
        except ValueError:
            raise ModelError(
                "the tokenizer has no chat template, and the prompt is made of messages",
                "prompt",
                "set prompt.chat_template, use prompt.template, or another model",
            ) from None
        self._refuse_unread(settings.template_kwargs)
        self.variables = {**tokenizer.special_tokens_map, **settings.template_kwargs}
        in_parts = any(not isinstance(message.content, str) for message in self.messages)
        self.reads_parts = in_parts and self._finds_parts()
        self._refuse_lost_messages()
        if settings.tools is not None:
            self._refuse_lost_tools()

    def rows(self, batch: pa.RecordBatch) -> list[Chat | RowFault]:
        """See `PromptSource`: a row is a conversation."""
        messages = self._messages(batch)
        if self.tools_column is None:
            return [row if isinstance(row, RowFault) else Chat(row, self.tools) for row in messages]
        tools = tools_of(self.tools_column, batch.column(self.tools_column), self.guard)
        return [_chat(row, own) for row, own in zip(messages, tools, strict=True)]

    def texts(self, rows: list[Chat]) -> list[str | RowFault]:
        """The conversations as the chat template writes them, or its fault."""
        chats = [(self._as_read(row.messages), row.tools) for row in rows]
        return RENDERER.chats(self.chat_template, self.variables, chats)

    def is_empty(self, row: Chat) -> bool:
        """Whether no user says anything."""
        return not any(any(_texts(message)) for message in _asking(row.messages))

    def begun(self, row: Chat) -> str | None:
        """The text of a last message of the assistant, None without one."""
        last = row.messages[-1] if row.messages else None
        return None if last is None or last["role"] != "assistant" else _joined(last)

    def shorten(self, row: Chat, excess: int, drop: Drop) -> Chat | None:
        """The conversation with less of its longest part; None where that is empty."""
        asking = _asking(row.messages)
        longest, place = max(
            ((message, i) for message in asking for i in range(len(_texts(message)))),
            key=lambda one: len(_texts(one[0])[one[1]]),
        )
        texts = _texts(longest)
        if not texts[place]:
            return None
        texts[place] = drop(texts[place], excess)
        cut = {**longest, "content": _content(texts, longest["content"])}
        return replace(row, messages=[cut if message is longest else message for message in row.messages])

    def _messages(self, batch: pa.RecordBatch) -> list[list[Message] | RowFault]:
        if self.column is not None:
            column = conversations(batch.column(self.column))
            return [null_prompt(self.column) if row is None else self.guard(row) for row in column]
        return [
            row if isinstance(row, RowFault) else self._with_texts(row)
            for row in self.templates.render(batch)
        ]

    def _with_texts(self, texts: list[str]) -> list[Message]:
        """The job's messages with these texts, one for each part."""
        rest = iter(texts)
        return [
            {"role": m.role, "content": _content([next(rest) for _ in m.texts], m.content)}
            for m in self.messages
        ]

    def _as_read(self, messages: list[Message]) -> list[Message]:
        """A template that takes content for a text gets one: its parts, each on lines of its own."""
        if self.reads_parts:
            return messages
        return [
            message if isinstance(message["content"], str) else {**message, "content": _joined(message)}
            for message in messages
        ]

    def _finds_parts(self) -> bool:
        """Whether the template takes a list of parts as content: it writes their texts, and not the list itself."""
        probe = self._probe()
        (text,) = RENDERER.chats(self.chat_template, self.variables, [(probe, None)])
        wanted = [part for message in probe for part in _texts(message)]
        return isinstance(text, str) and all(part in text for part in wanted) and not _PRINTED.search(text)

    def _probe(self) -> list[Message]:
        count = sum(len(message.texts) for message in self.messages)
        return self._with_texts([f"content-{i}-of-a-message" for i in range(count)])

    def _refuse_lost_messages(self) -> None:
        """Raises ModelError where the chat template writes nothing for a role, as many do for one they do not know."""
        row = self._probe()
        text = self.texts([Chat(row)])[0]
        if isinstance(text, RowFault):
            # Rows will say so, with their own contents.
            return
        for message in row:
            if not all(part in text for part in _texts(message)):
                raise ModelError(
                    f"the chat template leaves out messages of the role {message['role']!r}",
                    "prompt.messages",
                    "use a role that it knows: system, user or assistant as a rule",
                )

    def _refuse_lost_tools(self) -> None:
        """Raises ModelError where the chat template writes nothing of tools."""
        row = self._probe() or [{"role": "user", "content": "content-of-a-message"}]
        text = self.texts([Chat(row, [PROBE_TOOL])])[0]
        if isinstance(text, str) and PROBE_NAME not in text:
            raise ModelError(
                "the chat template leaves tools out",
                "prompt.tools",
                "use a model that was trained with tools, set prompt.chat_template, or write them into a message",
            )

    def _refuse_unread(self, variables: dict[str, Any]) -> None:
        words = sorted(set(re.findall(r"[^\W\d]\w*", self.chat_template)))
        for name in variables:
            if name not in words:
                close = difflib.get_close_matches(name, words, n=1)
                hint = f", did you mean {close[0]!r}?" if close else ""
                raise JobError(
                    f"the chat template reads no variable {name!r}{hint}",
                    "prompt.template_kwargs",
                    "leave it out, or use the name that the model's card gives",
                )


def _chat(messages: list[Message] | RowFault, tools: Tools | RowFault | None) -> Chat | RowFault:
    if isinstance(messages, RowFault):
        return messages
    return tools if isinstance(tools, RowFault) else Chat(messages, tools)


def _asking(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "user"] or messages


def _texts(message: Message) -> list[str]:
    """The content's text, or those of its parts."""
    content = message["content"]
    return [content] if isinstance(content, str) else [part["text"] for part in content]


def _joined(message: Message) -> str:
    return "\n".join(_texts(message))


def _content(texts: list[str], like: Any) -> Any:
    """These texts as content of the same form as `like`: a text, or a list of parts."""
    return texts[0] if isinstance(like, str) else [{"type": "text", "text": text} for text in texts]
