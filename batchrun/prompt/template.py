"""The job's Jinja templates: what columns they read, and a row's text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
from jinja2 import StrictUndefined, TemplateError, TemplateSyntaxError, meta

from batchrun.errors import FaultCode, InputError, JobError, RowFault, nearest
from batchrun.job.settings import PromptSettings
from batchrun.prompt.sandbox import Sandbox


class NullPrinted(Exception):
    """A template makes text of a value that is null."""


class _Null:
    """A null column: false, equal to none, and never text. Plain None would become "None" in any filter."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise NullPrinted


NULL = _Null()


class RowTemplate:
    """A Jinja text over a row's columns, in a sandbox: templates come with job files, and those are shared.

    `where` is the setting it stands in, for errors; `columns` are the names that it reads.

    Raises:
        JobError: a syntax error, with its line.
    """

    def __init__(self, source: str, where: str) -> None:
        self.where = where
        try:
            tree = _ENVIRONMENT.parse(source)
            self.columns = sorted(meta.find_undeclared_variables(tree))
            template = _ENVIRONMENT.from_string(source)
        except TemplateSyntaxError as error:
            raise JobError(f"line {error.lineno}: {error.message}", where, "mend the template") from None
        except TemplateError as error:
            raise JobError(str(error), where, "mend the template") from None
        self._template = template

    def render(self, row: dict[str, Any]) -> str | RowFault:
        """The row's text, or the row's fault. Null columns stand in `row` as NULL."""
        _ENVIRONMENT.begin()
        try:
            return self._template.render(row)
        except NullPrinted:
            return RowFault(FaultCode.NULL_PROMPT, f"{self.where} prints a null value")
        except Exception as error:  # a template runs the job's own expressions: they may raise anything
            return RowFault(FaultCode.TEMPLATE_ERROR, f"{type(error).__name__}: {error}")


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


def check_columns(columns: Sequence[str], schema: pa.Schema) -> None:
    """Refuses a prompt over columns that are not there.

    Raises:
        InputError: names them, each with the nearest that is.
    """
    missing = [name for name in columns if name not in schema.names]
    if missing:
        hints = "; ".join(f"{name!r}{nearest(name, schema.names)}" for name in missing)
        raise InputError(f"the prompt reads columns that the input does not have: {hints}", "prompt")


def _printed(value: Any) -> Any:
    if value is None:
        raise NullPrinted
    return value


def _as_json(value: object) -> None:
    if not isinstance(value, _Null):
        raise TypeError(f"{type(value).__name__} is not JSON serializable")


_ENVIRONMENT = Sandbox(
    undefined=StrictUndefined, finalize=_printed, keep_trailing_newline=True, autoescape=False
)
# Any other global would hide a column of its name.
_ENVIRONMENT.globals = {name: _ENVIRONMENT.globals[name] for name in ("range", "namespace")}
_ENVIRONMENT.tests["none"] = lambda value: value is None or value is NULL
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"default": _as_json, "ensure_ascii": False}
