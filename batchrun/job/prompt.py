"""The prompt's section of a job file: what a row becomes before it is tokenized."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from batchrun.job.settings import Settings
from batchrun.job.tools import not_json, tools_fault

# Arguments of transformers' apply_chat_template that a job gives in another place, or that batchrun decides.
_DECIDED_ELSEWHERE = {
    "messages": "use prompt.messages or prompt.column",
    "conversation": "use prompt.messages or prompt.column",
    "conversations": "use prompt.messages or prompt.column",
    "tools": "use prompt.tools",
    "chat_template": "use prompt.chat_template",
    "add_generation_prompt": "it is true, and false where the last message is the assistant's",
    "continue_final_message": "it is true where the last message is the assistant's",
    "return_assistant_tokens_mask": "only token ids are wanted of a prompt",
}


class TextPart(Settings):
    """One part of a message's content, as in OpenAI's API."""

    type: Literal["text"] = Field(description="of the part; models read text alone here")
    text: str = Field(description="Jinja text over the row's columns")


class Message(Settings):
    """One message of a conversation."""

    role: str = Field(
        description="system, user or assistant, as the chat template knows them; the answer continues a last message "
        "of the assistant"
    )
    content: str | list[TextPart] = Field(description="Jinja text over the row's columns, or a list of them")

    @property
    def texts(self) -> list[str]:
        """The Jinja texts of the content, one for each part."""
        return [self.content] if isinstance(self.content, str) else [part.text for part in self.content]

    @field_validator("content", mode="before")
    @classmethod
    def _text_alone(cls, content: Any) -> Any:
        if isinstance(content, str):
            return content
        if not isinstance(content, list) or not content:
            raise ValueError("give text, in quotes, or a list of {type: text, text: ...}")
        for i, part in enumerate(content):
            kind = part.get("type") if isinstance(part, dict) else "text"
            if kind not in ("text", None):
                raise ValueError(
                    f"part {i} has the type {kind!r}, and models read text alone here: put what it says (a "
                    "caption, a transcript) into a column and use {type: text, text: ...}"
                )
            is_text = isinstance(part, TextPart) or (
                isinstance(part, dict) and part.keys() == {"type", "text"} and isinstance(part["text"], str)
            )
            if not is_text:
                raise ValueError(f"part {i} is not a text part: write {{type: text, text: ...}}")
        return content


class ToolsColumn(Settings):
    """Tools that differ from row to row."""

    column: str = Field(
        description="a column with each row's tools: JSON text, or a list of structs; null is none"
    )


class PromptSettings(Settings):
    """What becomes of a row before it is tokenized: exactly one of template, messages, column."""

    template: str | None = Field(None, description="Jinja text over the row's columns, sent as it is")
    messages: list[Message] | None = Field(
        None, min_length=1, description="Jinja messages through the chat template"
    )
    column: str | None = Field(None, description="a ready column: text, or a list of role/content structs")
    chat_template: str | None = Field(None, description="used instead of the tokenizer's own chat template")
    template_kwargs: dict[str, Any] = Field(
        default_factory=dict, description="variables of the chat template, such as enable_thinking: false"
    )
    tools: list[dict[str, Any]] | ToolsColumn | None = Field(
        None,
        description="tools for the chat template, in OpenAI's form: a list of {type: function, function: {name: ..., "
        "description: ..., parameters: ...}}, or {column: name} for each row's own",
    )
    special_tokens: Literal["text", "parse"] = Field(
        "text",
        description="what row values that spell special tokens become: text, so that no row forges a role, or "
        "(parse) those tokens",
    )
    truncate: Literal["left", "right"] | None = Field(
        None, description="the side cut off a prompt that is too long"
    )
    empty: Literal["fail", "send"] = Field("fail", description="what an empty prompt becomes")
    max_bytes: int = Field(
        1 << 20, ge=1, description="a longer rendered prompt is cut (prompt.truncate), or its row fails"
    )

    @model_validator(mode="after")
    def _one_source(self) -> Self:
        if sum(v is not None for v in (self.template, self.messages, self.column)) != 1:
            raise ValueError("give exactly one of template, messages, column")
        return self

    @field_validator("template_kwargs", mode="after")
    @classmethod
    def _free_names(cls, variables: dict[str, Any]) -> dict[str, Any]:
        for name in variables:
            if name in _DECIDED_ELSEWHERE:
                raise ValueError(f"{name} cannot be set here: {_DECIDED_ELSEWHERE[name]}")
        if fault := not_json(variables):
            raise ValueError(fault)
        return variables

    @field_validator("tools", mode="before")
    @classmethod
    def _whole_tools(cls, tools: Any) -> Any:
        if isinstance(tools, ToolsColumn) or tools is None:
            return tools
        if isinstance(tools, dict) and isinstance(tools.get("column"), str) and len(tools) == 1:
            return tools
        if not isinstance(tools, list) or not tools:
            raise ValueError("give a list of tools, or {column: name}")
        if fault := tools_fault(tools):
            raise ValueError(fault)
        return tools

    @model_validator(mode="after")
    def _chat_template_is_used(self) -> Self:
        for name in ("template_kwargs", "tools"):
            if self.template is not None and getattr(self, name):
                raise ValueError(
                    f"{name} is for the chat template, which template does without: use messages"
                )
        return self
