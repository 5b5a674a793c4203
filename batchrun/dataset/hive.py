"""Folders named key=value (`day=2026-01-01/`): columns whose values stand in the paths of a dataset's files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from urllib.parse import unquote

import pyarrow as pa

from batchrun.dataset.filters import Filters, Term

# What Hive, Spark and pyarrow write for a null.
NULL = "__HIVE_DEFAULT_PARTITION__"

# The keys of a path in order, each with its value as the folder spells it.
Keys = tuple[tuple[str, str], ...]


def keys_of(relative: str) -> Keys:
    """The keys in the folders of a path, which starts below the dataset's own folder."""
    parts = (folder.partition("=") for folder in relative.split("/")[:-1])
    return tuple((unquote(name), value) for name, equals, value in parts if equals and name)


def folder_of(keys: Keys, names: Sequence[str]) -> str:
    """The folders, with a slash at the end, of the keys `names`; empty without names."""
    values = dict(keys)
    return "".join(f"{name}={values[name]}/" for name in names)


def key_fields(found: Iterable[Keys], known: pa.Schema | None = None) -> dict[str, pa.Field]:
    """A column for every key: int64 where every value is a plain whole number, else string; or as in `known`."""
    values: dict[str, set[str]] = {}
    for keys in found:
        for name, value in keys:
            values.setdefault(name, set()).add(value)
    fields = {}
    for name, texts in values.items():
        if known is not None and name in known.names:
            kind = known.field(name).type
        else:
            whole = all(_is_whole(text) for text in texts if text != NULL) and texts != {NULL}
            kind = pa.int64() if whole else pa.string()
        fields[name] = pa.field(name, kind)
    return fields


def scalar_of(value: str, kind: pa.DataType) -> pa.Scalar:
    """A key's value as a column of type `kind` has it. Raises ArrowInvalid where it cannot be one."""
    return pa.scalar(None if value == NULL else unquote(value), pa.string()).cast(kind)


def constants(keys: Keys, schema: pa.Schema) -> dict[str, pa.Scalar]:
    """The values of a file's keys, those that are columns of `schema`."""
    return {name: scalar_of(value, schema.field(name).type) for name, value in keys if name in schema.names}


def passing(filters: Filters, fields: Mapping[str, pa.Field], keys: Keys) -> Filters | None:
    """What is left of the filters for a file with these keys: no condition on a key any more, and none of the groups
    that no row of it passes. None where no row passes at all; empty groups where every row does."""
    values = dict(keys)
    left = []
    for group in filters.groups:
        known = [term for term in group if term.column in fields]
        if all(_holds(term, fields[term.column].type, values.get(term.column, NULL)) for term in known):
            left.append([term for term in group if term.column not in fields])
    return Filters(left) if left else None


def _holds(term: Term, kind: pa.DataType, value: str) -> bool:
    return bool(term.holds(pa.array([scalar_of(value, kind).as_py()], kind))[0].as_py())


def _is_whole(text: str) -> bool:
    digits = text.removeprefix("-")
    return digits.isascii() and digits.isdigit() and str(int(digits)) == digits and len(digits) < 19
