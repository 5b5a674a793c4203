"""The job's Jinja templates: what columns they read, and whether they are right."""

from __future__ import annotations

from collections.abc import Sequence

import pyarrow as pa
from jinja2 import TemplateSyntaxError, meta

from batchrun.errors import InputError, JobError, nearest
from batchrun.job.settings import PromptSettings
from batchrun.prompt.renderer import RENDERER
from batchrun.prompt.sandbox import ENVIRONMENT


class RowTemplate:
    """A Jinja text over a row's columns. `where` is the setting it stands in, `columns` are the names it reads.

    Raises:
        JobError: a syntax error, with its line.
    """

    def __init__(self, source: str, where: str) -> None:
        self.source, self.where = source, where
        try:
            self.columns = sorted(meta.find_undeclared_variables(ENVIRONMENT.parse(source)))
        except TemplateSyntaxError as error:
            raise JobError(f"line {error.lineno}: {error.message}", where, "fix the template") from None


def prompt_columns(settings: PromptSettings) -> list[str]:
    """The columns that the prompt reads: what a plan needs to know before it knows any schema.

    Raises:
        JobError: a template with a syntax error.
    """
    if settings.column is not None:
        return [settings.column]
    return list(dict.fromkeys(name for template in row_templates(settings) for name in template.columns))


def row_templates(settings: PromptSettings) -> list[RowTemplate]:
    """The job's templates: one for a text, one for each message, none for a ready column."""
    if settings.template is not None:
        return [RowTemplate(settings.template, "prompt.template")]
    messages = settings.messages or []
    return [RowTemplate(m.content, f"prompt.messages[{i}].content") for i, m in enumerate(messages)]


def check_templates(templates: Sequence[RowTemplate]) -> None:
    """Compiles templates, as rendering will.

    Raises:
        JobError: an unknown filter or test, or a constant that takes too much time or memory.
    """
    errors = RENDERER.compile_errors([template.source for template in templates]) if templates else []
    for template, error in zip(templates, errors, strict=True):
        if error is not None:
            raise JobError(error, template.where, "fix the template")


def check_columns(columns: Sequence[str], schema: pa.Schema) -> None:
    """Refuses a prompt over columns that are not there.

    Raises:
        InputError: names them, each with the nearest that is.
    """
    missing = [name for name in columns if name not in schema.names]
    if missing:
        hints = "; ".join(f"{name!r}{nearest(name, schema.names)}" for name in missing)
        raise InputError(f"the prompt reads columns that the input does not have: {hints}", "prompt")
