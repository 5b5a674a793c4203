"""The keywords of one schema object as facts that can be joined with those of another (allOf, $ref, anyOf)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from typing import Any

from batchrun.errors import JobError, nearest
from batchrun.structured.decimals import Bound, decimal

TYPES = ("object", "array", "string", "integer", "number", "boolean", "null")

ANNOTATIONS = {
    "title", "description", "default", "example", "examples", "deprecated", "readOnly", "writeOnly", "discriminator",
    "$schema", "$id", "id", "$comment", "$anchor", "$defs", "definitions", "$vocabulary",
    "contentMediaType", "contentEncoding", "contentSchema",
}  # fmt: skip
COMBINING = ("$ref", "allOf", "anyOf", "oneOf")

_OF_TYPE = {
    "object": {"properties", "required", "additionalProperties"},
    "array": {"items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"},
    "string": {"minLength", "maxLength", "pattern", "format"},
    "number": {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"},
}
KEYWORDS = {"type", "enum", "const", *COMBINING, *(word for words in _OF_TYPE.values() for word in words)}

ALTERNATIVES = {
    "not": "list what is allowed, in enum or with bounds",
    "if": "write the cases as anyOf, each with all its properties",
    "then": "write the cases as anyOf, each with all its properties",
    "else": "write the cases as anyOf, each with all its properties",
    "patternProperties": "declare the properties, or use an array of objects with a name and a value",
    "propertyNames": "declare the properties, or use an array of objects with a name and a value",
    "minProperties": "name the properties in required",
    "maxProperties": "declare only the properties that are wanted",
    "dependentRequired": "name the properties in required, or write the cases as anyOf",
    "dependentSchemas": "write the cases as anyOf, each with all its properties",
    "dependencies": "write the cases as anyOf, each with all its properties",
    "contains": "use items, or prefixItems",
    "minContains": "use items, or prefixItems",
    "maxContains": "use items, or prefixItems",
    "unevaluatedProperties": "use additionalProperties: false",
    "unevaluatedItems": "use items: false behind prefixItems",
    "uniqueItems": "leave it out, and remove repeated items afterwards",
    "$dynamicRef": "use $ref to #/$defs/NAME",
    "$recursiveRef": "use $ref to #/$defs/NAME",
}


def refusal(what: str, where: str, fix: str) -> JobError:
    """The error for what is not supported; `where` is its JSON pointer."""
    return JobError(what, f"answer.schema at {where or '/'}", fix)


@dataclass(frozen=True)
class Place:
    """A schema and where it stands; `refs` are the pointers that were followed to get there, in their order."""

    schema: Any
    where: str
    refs: tuple[str, ...] = ()

    def __truediv__(self, key: str | int) -> Place:
        return self.at(str(key), self.schema[key])

    def at(self, key: str, schema: Any) -> Place:
        """A schema inside this one, under the key."""
        escaped = key.replace("~", "~0").replace("/", "~1")
        return Place(schema, f"{self.where}/{escaped}", self.refs)


@dataclass(frozen=True)
class Additional:
    """What a schema that declares the properties `names` says of all others."""

    names: frozenset[str]
    place: Place


@dataclass(frozen=True)
class Facts:
    """All that schemas say about one value, joined; None or empty where they say nothing.

    `of_oneof` names the oneOf options that these facts are of: (where the oneOf is, which option).
    """

    where: str
    types: frozenset[str] | None = None
    values: tuple[Any, ...] | None = None
    lows: tuple[Bound, ...] = ()
    highs: tuple[Bound, ...] = ()
    multiples: tuple[float, ...] = ()
    min_length: int = 0
    max_length: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()
    min_items: int = 0
    max_items: int | None = None
    prefix: tuple[tuple[Place, ...], ...] = ()
    items: tuple[Place, ...] = ()
    properties: dict[str, tuple[Place, ...]] = field(default_factory=dict)
    required: tuple[str, ...] = ()
    additional: tuple[Additional, ...] = ()
    implied: frozenset[str] = frozenset()
    of_oneof: tuple[tuple[str, int], ...] = ()

    def joined(self, other: Facts) -> Facts | None:
        """Both at once; None where no value can be."""
        types = _common_types(self.types, other.types)
        values = _common_values(self.values, other.values)
        if types == frozenset() or values == ():
            return None
        if (self.prefix or other.prefix) and (self.items or self.prefix) and (other.items or other.prefix):
            raise refusal("prefixItems cannot be joined with items", other.where, "write one array schema")
        names = [*self.properties, *(name for name in other.properties if name not in self.properties)]
        return replace(
            self,
            types=types,
            values=values,
            lows=self.lows + other.lows,
            highs=self.highs + other.highs,
            multiples=self.multiples + other.multiples,
            min_length=max(self.min_length, other.min_length),
            max_length=_least(self.max_length, other.max_length),
            patterns=tuple(dict.fromkeys(self.patterns + other.patterns)),
            formats=tuple(dict.fromkeys(self.formats + other.formats)),
            min_items=max(self.min_items, other.min_items),
            max_items=_least(self.max_items, other.max_items),
            prefix=self.prefix or other.prefix,
            items=self.items + other.items,
            properties={n: self.properties.get(n, ()) + other.properties.get(n, ()) for n in names},
            required=tuple(dict.fromkeys(self.required + other.required)),
            additional=self.additional + other.additional,
            implied=self.implied | other.implied,
            of_oneof=self.of_oneof + other.of_oneof,
        )


def facts_of(place: Place) -> Facts | None:
    """What the schema says by itself, without what it joins; None where it allows nothing.

    Raises:
        JobError: a keyword that is not supported, or has no such value.
    """
    schema, where = place.schema, place.where
    if schema is False:
        return None
    if schema is True:
        return Facts(where)
    if not isinstance(schema, dict):
        raise refusal("a schema is a mapping, or true or false", where, "write {type: ...}")
    _check_keywords(schema, where)
    types = _types(schema, where)
    lows, highs = [*_bounds(schema, where, "inimum")], [*_bounds(schema, where, "aximum")]
    prefix, items = _items(place)
    multiple = _number(schema, "multipleOf", where)
    if multiple is not None and multiple <= 0:
        raise refusal("multipleOf is not above 0", where, "give a positive number")
    properties = _mapping(schema, "properties", where)
    inner = place.at("properties", properties)
    return Facts(
        where,
        types=types,
        values=_values(schema, where),
        lows=tuple(lows),
        highs=tuple(highs),
        multiples=() if multiple is None else (multiple,),
        min_length=_count(schema, "minLength", where) or 0,
        max_length=_count(schema, "maxLength", where),
        patterns=_text(schema, "pattern", where),
        formats=_text(schema, "format", where),
        min_items=_count(schema, "minItems", where) or 0,
        max_items=_count(schema, "maxItems", where),
        prefix=prefix,
        items=items,
        properties={name: (inner / name,) for name in properties},
        required=_names(schema, where),
        additional=(
            (Additional(frozenset(properties), place / "additionalProperties"),)
            if schema.get("additionalProperties", True) is not True
            else ()
        ),
        implied=frozenset(kind for kind, words in _OF_TYPE.items() if words & schema.keys()),
    )


def canonical(value: Any) -> str:
    """A JSON value as answers write it: `json.dumps` with its own separators, and characters as themselves."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def type_of(value: Any) -> str:
    """The JSON Schema type of a value, "integer" for whole numbers."""
    if isinstance(value, bool):
        return "boolean"
    if isinstance(value, int) or (isinstance(value, float) and value.is_integer()):
        return "integer"
    kinds = {str: "string", float: "number", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _check_keywords(schema: dict[str, Any], where: str) -> None:
    for word, value in schema.items():
        if word in KEYWORDS and not (word == "uniqueItems" and value):
            continue
        if (
            word in ANNOTATIONS
            or str(word).startswith(("x-", "_"))
            or (value is False and word in ALTERNATIVES)
        ):
            continue
        if word in ALTERNATIVES:
            raise refusal(f"{word} is not supported", where, ALTERNATIVES[word])
        # Any other word is a note to people, unless it is a keyword misspelt.
        known = {one.lower(): one for one in (*KEYWORDS, *ALTERNATIVES)}
        if meant := get_close_matches(str(word).lower(), known, n=1, cutoff=0.87):
            raise refusal(f"unknown keyword {word!r}, did you mean {known[meant[0]]!r}?", where, "correct it")


def _types(schema: dict[str, Any], where: str) -> frozenset[str] | None:
    if "type" not in schema:
        return None
    types = schema["type"] if isinstance(schema["type"], list) else [schema["type"]]
    for kind in types:
        if kind not in TYPES:
            known = nearest(str(kind), TYPES)
            raise refusal(f"unknown type {kind!r}{known}", where, f"use one of {', '.join(TYPES)}")
    return frozenset(types)


def _values(schema: dict[str, Any], where: str) -> tuple[Any, ...] | None:
    values = schema.get("enum")
    if values is not None and (not isinstance(values, list) or not values):
        raise refusal("enum is not a list of values", where, "give at least one value")
    if "const" in schema:
        return _common_values(None if values is None else tuple(values), (schema["const"],))
    return None if values is None else tuple({canonical(value): value for value in values}.values())


def _bounds(schema: dict[str, Any], where: str, name: str) -> Iterator[Bound]:
    plain, exclusive = f"m{name}", f"exclusiveM{name}"
    bound = _number(schema, plain, where)
    # In draft 4 it is a boolean that belongs to the plain bound.
    old = isinstance(schema.get(exclusive), bool)
    if bound is not None:
        yield Bound(decimal(bound), not (old and schema[exclusive]))
    if not old and (bound := _number(schema, exclusive, where)) is not None:
        yield Bound(decimal(bound), False)


def _items(place: Place) -> tuple[tuple[tuple[Place, ...], ...], tuple[Place, ...]]:
    """The places of the first items and of all others."""
    schema = place.schema
    prefix, rest = "prefixItems", "items"
    if isinstance(schema.get("items"), list):
        # Until draft 2019-09.
        prefix, rest = "items", "additionalItems"
    first = schema.get(prefix, [])
    if not isinstance(first, list):
        raise refusal(f"{prefix} is not a list", place.where, "give a list of schemas")
    inner = place.at(prefix, first)
    places = tuple((inner / i,) for i in range(len(first)))
    return places, (place / rest,) if rest in schema else ()


def _mapping(schema: dict[str, Any], word: str, where: str) -> dict[str, Any]:
    value = schema.get(word, {})
    if not isinstance(value, dict):
        raise refusal(f"{word} is not a mapping", where, "give each name a schema")
    return value


def _names(schema: dict[str, Any], where: str) -> tuple[str, ...]:
    value = schema.get("required", [])
    if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
        raise refusal(
            "required is not a list of names", where, "write required: [name, ...] beside properties"
        )
    return tuple(value)


def _text(schema: dict[str, Any], word: str, where: str) -> tuple[str, ...]:
    value = schema.get(word)
    if value is not None and not isinstance(value, str):
        raise refusal(f"{word} is not text", where, "write it in quotes")
    return () if value is None else (value,)


def _count(schema: dict[str, Any], word: str, where: str) -> int | None:
    value = _number(schema, word, where)
    if value is not None and (value < 0 or value != int(value)):
        raise refusal(f"{word} is not a whole number from 0", where, "give one")
    return None if value is None else int(value)


def _number(schema: dict[str, Any], word: str, where: str) -> float | None:
    value = schema.get(word)
    if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
        raise refusal(f"{word} is not a number", where, "give one")
    return value


def _common_types(one: frozenset[str] | None, other: frozenset[str] | None) -> frozenset[str] | None:
    if one is None or other is None:
        return other if one is None else one
    return _with_integers(one) & _with_integers(other)


def _with_integers(types: frozenset[str]) -> frozenset[str]:
    return types | {"integer"} if "number" in types else types


def _common_values(one: tuple[Any, ...] | None, other: tuple[Any, ...] | None) -> tuple[Any, ...] | None:
    if one is None or other is None:
        return other if one is None else one
    return tuple(value for value in one if any(value == v and type_of(value) == type_of(v) for v in other))


def _least(one: int | None, other: int | None) -> int | None:
    return min((n for n in (one, other) if n is not None), default=None)
