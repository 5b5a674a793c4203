"""The job file's keys for editors (JSON Schema) and for people (Markdown), both out of the typed model."""

from __future__ import annotations

import json
import typing
from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from batchrun.job.job import Job

COMMAND = "batchrun schema --markdown > jobs/REFERENCE.md"


def json_schema() -> dict[str, Any]:
    """A JSON Schema (draft 2020-12) of the job file."""
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **Job.model_json_schema(),
        "title": "batchrun job",
    }


def markdown() -> str:
    """Every key of the job file: a section each, with type, default and meaning."""
    lines = [
        "# Every key of a job file",
        "",
        f"Made by `{COMMAND}`; any key can be overridden with `--set section.key=value`.",
    ]
    for name, field, schema in job_keys():
        if name in Job.model_fields:
            required = " Required." if field.is_required() else ""
            lines += ["", f"## {name}", "", f"{_sentence(field)}{required}", ""]
            lines += ["| key | type | default | meaning |", "| --- | --- | --- | --- |"]
        else:
            meaning, kind = _escaped(field.description or ""), _escaped(_kind(schema))
            lines.append(f"| `{name.partition('.')[2]}` | {kind} | {_default(field)} | {meaning} |")
    return "\n".join(lines) + "\n"


def job_keys(
    model: type[BaseModel] = Job, prefix: str = ""
) -> Iterator[tuple[str, FieldInfo, dict[str, Any]]]:
    """Every key's dotted name ([] for the items of a list), its field and its JSON Schema, sections first."""
    properties = model.model_json_schema()["properties"]
    for own_name, field in model.model_fields.items():
        name = field.alias or own_name
        yield f"{prefix}{name}", field, properties[name]
        for inner, part in _sections(field.annotation, f"{prefix}{name}"):
            yield from job_keys(part, f"{inner}.")


def _sections(annotation: Any, name: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """The models that an annotation holds, in a list, a mapping or a union too, and what their keys begin with."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield name, annotation
        return
    origin = typing.get_origin(annotation)
    inner = f"{name}[]" if origin is list else f"{name}.*" if origin is dict else name
    for argument in typing.get_args(annotation):
        yield from _sections(argument, inner)


def _kind(schema: dict[str, Any]) -> str:
    """A property's type in words: `integer, at least 1`, `left or right`."""
    if choices := schema.get("anyOf", schema.get("oneOf")):
        kinds = [_kind(choice) for choice in choices if choice.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "enum" in schema or "const" in schema:
        return " or ".join(f"`{value}`" for value in schema.get("enum", [schema.get("const")]))
    if "$ref" in schema:
        return "mapping"
    if schema.get("type") == "array":
        return f"list of {_plural(_kind(schema.get('items', {})))}"
    if schema.get("type") == "object":
        return "mapping"
    bounds = [
        f"{word} {_number(schema[name])}"
        for name, word in (
            ("minimum", "at least"),
            ("exclusiveMinimum", "above"),
            ("maximum", "at most"),
            ("exclusiveMaximum", "below"),
        )
        if name in schema and abs(schema[name]) < 1 << 53
    ]
    return ", ".join([_WORDS.get(schema.get("type", ""), "anything"), *bounds])


_WORDS = {
    "string": "text",
    "integer": "integer",
    "number": "number",
    "boolean": "true or false",
    "null": "nothing",
}


def _plural(kind: str) -> str:
    return {"text": "texts", "integer": "integers", "number": "numbers", "mapping": "mappings"}.get(
        kind, kind
    )


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else f"{value}"


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    return "" if value is None else f"`{json.dumps(value)}`"


def _sentence(field: FieldInfo) -> str:
    text = field.description or ""
    return f"{text[:1].upper()}{text[1:]}."


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
