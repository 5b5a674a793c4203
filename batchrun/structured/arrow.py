"""The Arrow type of a schema's answers, and answers as its values."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date, datetime
from functools import reduce
from typing import Any

import numpy as np
import pyarrow as pa

from batchrun.structured.facts import canonical, type_of
from batchrun.structured.nodes import Array, Integer, Literals, Node, Number, Object, String, options_of


@dataclass(frozen=True)
class Kind:
    """What a column holds: the name of one of `_TYPES`, "list" with its items, "struct" with its fields, or "enum" with
    its texts.

    "json" is what has no Arrow type of its own, such as a text or a number: a string column with its JSON.
    """

    name: str
    fields: tuple[tuple[str, Kind], ...] = ()
    texts: tuple[str, ...] = ()

    @property
    def type(self) -> pa.DataType:
        """The Arrow type; everything may be null."""
        if self.name == "struct":
            return pa.struct([pa.field(name, kind.type) for name, kind in self.fields])
        if self.name == "list":
            return pa.list_(self.fields[0][1].type)
        return _TYPES[self.name]


_TYPES = {
    "null": pa.null(),
    "bool": pa.bool_(),
    "int": pa.int64(),
    "float": pa.float64(),
    "string": pa.string(),
    "enum": pa.dictionary(pa.int32(), pa.string()),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us", "UTC"),
    "json": pa.string(),
}
_JSON = Kind("json")
_TEXTS = {"string", "enum", "date", "timestamp"}


def kind_of(node: Node) -> Kind:
    """What a column of the node's values holds."""
    match node:
        case Literals(values=values):
            kinds = {_LITERAL[type_of(value)] for value in values} - {"null"}
            if kinds == {"int", "float"}:
                return Kind("float")
            if any(isinstance(value, float) for value in values) and kinds == {"int"}:
                return Kind("float")
            if any(type_of(v) == "integer" and abs(v) >= 1 << 63 for v in values):
                return _JSON
            if kinds == {"enum"}:
                return Kind("enum", texts=tuple(v for v in values if v is not None))
            return Kind(kinds.pop()) if len(kinds) == 1 else _JSON if kinds else Kind("null")
        case Integer():
            return Kind("int")
        case Number():
            return Kind("float")
        case String(formats=formats):
            return Kind({"date": "date", "date-time": "timestamp"}.get((*formats, "")[0], "string"))
        case Object(properties=properties):
            return Kind("struct", tuple((one.name, kind_of(one.value)) for one in properties))
        case Array(prefix=prefix, items=items):
            inner = [*map(kind_of, prefix), *([] if items is None else [kind_of(items)])]
            return Kind("list", (("item", reduce(_both, inner, Kind("null"))),))
    return reduce(_both, map(kind_of, options_of(node)))


_LITERAL = {
    "null": "null",
    "boolean": "bool",
    "integer": "int",
    "number": "float",
    "string": "enum",
    "array": "json",
    "object": "json",
}


def _both(one: Kind, other: Kind) -> Kind:
    """The kind that holds the values of both."""
    if one == other or other.name == "null":
        return one
    if one.name == "null":
        return other
    names = {one.name, other.name}
    if names == {"int", "float"}:
        return Kind("float")
    if names == {"enum"}:
        return Kind("enum", texts=tuple(dict.fromkeys(one.texts + other.texts)))
    if names <= _TEXTS:
        return Kind("string")
    if names == {"list"}:
        return Kind("list", (("item", _both(one.fields[0][1], other.fields[0][1])),))
    if names == {"struct"}:
        fields = dict(one.fields)
        for name, kind in other.fields:
            fields[name] = _both(fields[name], kind) if name in fields else kind
        return Kind("struct", tuple(fields.items()))
    return _JSON


def to_array(kind: Kind, texts: Sequence[str | None]) -> pa.Array:
    """JSON documents as an array of the kind's type; None is null.

    Raises:
        ValueError: a text is no JSON, or no value of the kind.
    """
    try:
        return from_values(kind, [None if text is None else json.loads(text) for text in texts])
    except (pa.ArrowException, OverflowError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"no value of the answer's type ({error})") from error


def to_texts(kind: Kind, array: pa.Array | pa.ChunkedArray) -> list[str | None]:
    """The values as JSON documents again, of which `to_array` makes the same values; null is None."""
    written = _writer(kind)
    return [None if value is None else canonical(written(value)) for value in array.to_pylist()]


def from_values(kind: Kind, values: Sequence[Any]) -> pa.Array:
    """Parsed JSON values, column by column. What does not fit raises an error of pyarrow's or Python's own."""
    if kind.name == "struct":
        fields = [
            from_values(inner, [None if value is None else value.get(name) for value in values])
            for name, inner in kind.fields
        ]
        return pa.StructArray.from_arrays(fields, fields=[*kind.type], mask=_nulls(values))
    if kind.name == "list":
        offsets = np.cumsum([0, *(0 if value is None else len(value) for value in values)], dtype=np.int32)
        items = from_values(
            kind.fields[0][1], [one for value in values if value is not None for one in value]
        )
        return pa.ListArray.from_arrays(offsets, items, type=kind.type, mask=_nulls(values))
    if kind.name == "enum":
        numbers = {text: i for i, text in enumerate(kind.texts)}
        indices = pa.array([None if value is None else numbers[value] for value in values], pa.int32())
        return pa.DictionaryArray.from_arrays(indices, pa.array(kind.texts, pa.string()))
    if convert := _CONVERSIONS.get(kind.name):
        values = [None if value is None else convert(value) for value in values]
    return pa.array(values, kind.type)


def _nulls(values: Sequence[Any]) -> pa.Array:
    return pa.array([value is None for value in values], pa.bool_())


def _writer(kind: Kind) -> Callable[[Any], Any]:
    """From one of the kind's values, as pyarrow gives it, to a JSON value."""
    if kind.name == "struct":
        fields = [(name, _writer(inner)) for name, inner in kind.fields]
        return lambda value: value and {name: inner(value[name]) for name, inner in fields}
    if kind.name == "list":
        inner = _writer(kind.fields[0][1])
        return lambda value: value and [inner(one) for one in value]
    if kind.name == "json":
        return lambda value: value and json.loads(value)
    if kind.name in ("date", "timestamp"):
        return lambda value: value and value.isoformat()
    return lambda value: value


def _float(value: Any) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("a number beyond float64")
    return number


_CONVERSIONS: dict[str, Callable[[Any], Any]] = {
    "float": _float,
    "date": date.fromisoformat,
    "timestamp": datetime.fromisoformat,
    "json": canonical,
}
