"""What pydantic finds wrong with a job, in the job file's own words."""

from __future__ import annotations

from typing import Any, get_args

from pydantic import BaseModel

from batchrun.errors import nearest

# Characters of a wrong value.
SHOWN = 80

# What a value must be, by pydantic's type of error; the braces are its context's.
_MUST = {
    "greater_than": "must be above {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be below {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
    "literal_error": "must be {expected}",
    "string_type": "must be text, in quotes",
    "string_too_short": "must not be empty: give a name",
    "list_type": "must be a list, such as [a, b]",
    "too_short": "must have at least one",
    "dict_type": "must be a mapping of key: value",
    "model_type": "must be a mapping with the keys {keys}",
    "model_attributes_type": "must be a mapping with the keys {keys}",
    "int": "must be a whole number",
    "float": "must be a number",
    "bool": "must be true or false",
}


def explain(error: Any, job: type[BaseModel]) -> str:
    """One of pydantic's errors about a `job`: where, what and the fix."""
    location = [str(part) for part in keys_of(error)]
    name = ".".join(location)
    if error["type"] == "extra_forbidden":
        return f"unknown key {name}{nearest(location[-1], _keys(_section_around(location, job)))}"
    field = _section_around(location, job).model_fields.get(location[-1]) if location else None
    if error["type"] == "missing":
        return f"{name} is missing: add it{f' ({field.description})' if field else ''}"
    # Errors about numbers have names such as int_parsing, int_from_float and float_type.
    must = _MUST.get(error["type"]) or _MUST.get(error["type"].partition("_")[0])
    if must:
        message = must.format(keys=_keys_at(location, job), **error.get("ctx", {}))
    else:
        message = error["msg"].removeprefix("Value error, ")
    given, secret = error["input"], "storage_options" in name or name == "notify.url"
    said = isinstance(given, str) and _short(given) in message
    told = secret or said or isinstance(given, dict | BaseModel)
    return f"{name or 'job'}: {message}" + ("" if told else f" (got {_short(given)})")


def keys_of(error: Any) -> list[str | int]:
    """Where one of pydantic's errors is: keys and places in lists. Forms that a value may have are named in
    parentheses, and are none; a key that nobody knows may begin with one."""
    found = [part for part in error["loc"] if not str(part).startswith("(")]
    if error["type"] == "extra_forbidden" and str(error["loc"][-1]).startswith("("):
        found.append(error["loc"][-1])
    return found


def _keys(section: type[BaseModel]) -> list[str]:
    return [field.alias or name for name, field in section.model_fields.items()]


def _section_around(location: list[str], job: type[BaseModel]) -> type[BaseModel]:
    """The section that the key at this place is in, or would be."""
    return _section_of(location[:-1], job)


def _section_of(location: list[str], job: type[BaseModel]) -> type[BaseModel]:
    section = job
    for part in location:
        # An item of a list has a number and no field of its own: the list's field told its section.
        if (field := section.model_fields.get(part)) and (inner := _sections_in(field.annotation)):
            section = inner[0]
    return section


def _keys_at(location: list[str], job: type[BaseModel]) -> str:
    return ", ".join(_section_of(location, job).model_fields)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= SHOWN else f"{text[: SHOWN - 3]}..."


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a key's type is made of: itself, or those of an optional one or of a list."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for inner in get_args(annotation) for section in _sections_in(inner)]
