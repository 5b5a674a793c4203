"""The job's Jinja templates: what columns they read, whether they are right, and the texts that rows make of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
from jinja2 import TemplateSyntaxError, meta, nodes

from batchrun.errors import FaultCode, InputError, JobError, RowFault, nearest
from batchrun.job.prompt import PromptSettings, ToolsColumn
from batchrun.prompt.columns import holds_text, values
from batchrun.prompt.plain import PlainTemplate
from batchrun.prompt.renderer import RENDERER
from batchrun.prompt.sandbox import ENVIRONMENT, NULL_PRINTED, TEXT, TOO_LARGE

# Drops a number of units (bytes or tokens) from a text.
Drop = Callable[[str, int], str]
# Marks what a row value spells and must stay text.
Guard = Callable[[Any], Any]

# {name} as in an f-string, outside of Jinja's own braces and outside of JSON.
_BRACES = re.compile(r"(?<!\{)\{(\w+)\}(?!\})")
_BLOCKS = re.compile(r"\{\{.*?\}\}|\{%.*?%\}|\{#.*?#\}", re.DOTALL)


class RowTemplate:
    """A Jinja text over a row's columns. `where` is the setting it stands in, `columns` are the names it reads, `plain`
    the same without Jinja, where it only puts columns between texts.

    Raises:
        JobError: a syntax error, with its line.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source, self.where = source, where
        try:
            parsed = ENVIRONMENT.parse(source)
            self.columns = sorted(meta.find_undeclared_variables(parsed))
        except TemplateSyntaxError as error:
            what = f"line {error.lineno}: {error.message or ''}".rstrip(".")
            raise JobError(what, where, "fix the template") from None
        names = (name.name for name in parsed.find_all(nodes.Name))
        # The same, as the text first comes to each: where it is written, or decides what is.
        self.in_order = list(dict.fromkeys(name for name in names if name in self.columns))
        self.plain = PlainTemplate.of(parsed)


def prompt_columns(settings: PromptSettings) -> list[str]:
    """The columns that the prompt reads: what a plan needs to know before it knows any schema.

    Raises:
        JobError: a template with a syntax error.
    """
    tools = [settings.tools.column] if isinstance(settings.tools, ToolsColumn) else []
    return list(dict.fromkeys([*message_columns(settings), *tools]))


def leading_columns(settings: PromptSettings) -> list[str]:
    """The prompt's columns in the order in which a prompt comes to them.

    A chat template is taken to write system messages first, then tools, then the other messages. With one that does
    not, rows in the order of these columns begin less alike; no answer changes. Raises as `prompt_columns` does.
    """
    if settings.column is not None:
        return prompt_columns(settings)
    roles = ["user"] if settings.template is not None else []
    for message in settings.messages or []:
        roles += [message.role] * len(message.texts)
    tools = [settings.tools.column] if isinstance(settings.tools, ToolsColumn) else []
    system: list[str] = []
    rest: list[str] = []
    for role, template in zip(roles, row_templates(settings), strict=True):
        (system if role in ("system", "developer") else rest).extend(template.in_order)
    return list(dict.fromkeys([*system, *tools, *rest]))


def plain_fields(settings: PromptSettings) -> list[str]:
    """The columns of a prompt whose fields may change places and still make sense, in their order: all of them stand in
    one template, each of them once, as {{ column }} and in nothing else. Empty in any other prompt.

    Raises as `prompt_columns` does.
    """
    found = [template for template in row_templates(settings) if template.columns]
    if len(found) != 1 or isinstance(settings.tools, ToolsColumn):
        return []
    outputs = ENVIRONMENT.parse(found[0].source).body
    parts = [part for output in outputs for part in getattr(output, "nodes", [])]
    names = [part.name for part in parts if isinstance(part, nodes.Name)]
    plain = all(isinstance(output, nodes.Output) for output in outputs)
    plain &= all(isinstance(part, nodes.Name | nodes.TemplateData) for part in parts)
    return names if plain and len(set(names)) == len(names) else []


def literal_text(settings: PromptSettings) -> str:
    """What the templates write of their own behind the first of their fields. Raises as `prompt_columns` does."""
    text = "".join(template.source for template in row_templates(settings))
    field = re.search(r"\{[{%]", text)
    return _BLOCKS.sub("", text[field.start() :]) if field else ""


def message_columns(settings: PromptSettings) -> list[str]:
    """Those of the prompt's columns that its texts and messages are made of. Raises as `prompt_columns` does."""
    if settings.column is not None:
        return [settings.column]
    return list(dict.fromkeys(name for template in row_templates(settings) for name in template.columns))


def row_templates(settings: PromptSettings) -> list[RowTemplate]:
    """The job's templates: one for a text, one for each part of each message, none for a ready column."""
    if settings.template is not None:
        return [RowTemplate(settings.template, "prompt.template")]
    found = []
    for i, message in enumerate(settings.messages or []):
        where = f"prompt.messages[{i}].content"
        if isinstance(message.content, str):
            found.append(RowTemplate(message.content, where))
        else:
            found += [RowTemplate(text, f"{where}[{j}].text") for j, text in enumerate(message.texts)]
    return found


def check_templates(templates: Sequence[RowTemplate]) -> None:
    """Compiles templates, as rendering will.

    Raises:
        JobError: an unknown filter or test, or a constant that takes too much time or memory.
        BatchrunError: the process that would compile them was killed again and again.
    """
    compiled = [template for template in templates if template.plain is None]
    errors = RENDERER.compile_errors([template.source for template in compiled]) if compiled else []
    for template, error in zip(compiled, errors, strict=True):
        if error is not None:
            raise JobError(error.rstrip("."), template.where, "fix the template")


def check_columns(settings: PromptSettings, schema: pa.Schema) -> None:
    """Refuses a prompt over columns that are not there, and one without any, which would be the same for every row.

    Raises:
        JobError: no template reads a column; or one has a column in single braces, as in Python.
        InputError: names the columns that are not there, each with the nearest that is.
    """
    for template in row_templates(settings):
        for name in _BRACES.findall(_BLOCKS.sub("", template.source)):
            if name in schema.names:
                raise JobError(
                    f"{{{name}}} in single braces is sent as it is", template.where, f"write {{{{ {name} }}}}"
                )
    columns = prompt_columns(settings)
    if not columns:
        raise JobError(
            "the template reads no column, so that every row has the same prompt",
            "prompt",
            f"use a column, such as {{{{ {schema.names[0] if schema.names else 'text'} }}}}",
        )
    missing = [name for name in columns if name not in schema.names]
    if missing:
        hints = "; ".join(f"{name!r}{nearest(name, schema.names)}" for name in missing)
        raise InputError(f"the prompt reads columns that the input does not have: {hints}", "prompt")


class Templates:
    """The job's templates over the columns that they read. Plain ones over texts are joined here, at a tenth of the
    cost; all others are rendered in a process of their own."""

    def __init__(self, settings: PromptSettings, guard: Guard) -> None:
        templates = row_templates(settings)
        check_templates(templates)
        self.sources, self.columns = [t.source for t in templates], message_columns(settings)
        self.plain = [t.plain for t in templates if t.plain is not None]
        self.guard = guard

    def render(self, batch: pa.RecordBatch) -> list[list[str] | RowFault]:
        """(rows,) A row's texts, one per template, or its fault."""
        columns = [map(self.guard, values(batch.column(name))) for name in self.columns]
        rows: list[Any] = [*zip(*columns, strict=True)] if columns else [()] * batch.num_rows
        faults = {i: fault for i, row in enumerate(rows) if (fault := _fault(row)) is not None}
        are_texts = all(holds_text(batch.schema.field(name).type) for name in self.columns)
        is_plain = are_texts and len(self.plain) == len(self.sources)
        if is_plain:
            faults |= {i: _null_printed() for i, row in enumerate(rows) if i not in faults and None in row}
        good = [row for i, row in enumerate(rows) if i not in faults] if faults else rows
        found = self._joined(good) if is_plain else RENDERER.rows(self.sources, self.columns, good)
        rendered = iter(found)
        return [faults[i] if i in faults else next(rendered) for i in range(len(rows))]

    def _joined(self, rows: list[tuple[str, ...]]) -> list[list[str] | RowFault]:
        columns = dict(zip(self.columns, zip(*rows, strict=True), strict=True)) if rows else {}
        texts = [template.join(columns, len(rows)) for template in self.plain] if rows else []
        return [
            [*row] if max(map(len, row)) <= TEXT else RowFault(FaultCode.TEMPLATE_ERROR, TOO_LARGE)
            for row in zip(*texts, strict=True)
        ]


def _null_printed() -> RowFault:
    return RowFault(FaultCode.NULL_PROMPT, NULL_PRINTED)


def _fault(row: Sequence[Any]) -> RowFault | None:
    return next((value for value in row if isinstance(value, RowFault)), None)
