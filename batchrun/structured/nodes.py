"""What a JSON Schema of the supported kind says, as a tree: refs followed, allOf merged, every default spelt out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchrun.structured.decimals import Bound


@dataclass(frozen=True)
class Literals:
    """One of these JSON values; booleans and null are written so, too."""

    where: str
    values: tuple[Any, ...]


@dataclass(frozen=True)
class Integer:
    """A whole number that int64 holds."""

    where: str
    low: int
    high: int
    multiple: int = 1


@dataclass(frozen=True)
class Number:
    """A number that float64 holds."""

    where: str
    low: Bound | None = None
    high: Bound | None = None


@dataclass(frozen=True)
class String:
    """A text of `least` to `most` characters that has each of the patterns in it and each format."""

    where: str
    least: int = 0
    most: int | None = None
    patterns: tuple[str, ...] = ()
    formats: tuple[str, ...] = ()


@dataclass(frozen=True)
class Array:
    """The `prefix` one by one, then any number of `items` (None: no more), `least` to `most` in all."""

    where: str
    prefix: tuple[Node, ...] = ()
    items: Node | None = None
    least: int = 0
    most: int | None = None


@dataclass(frozen=True)
class Property:
    """A member of an object."""

    name: str
    value: Node
    required: bool


@dataclass(frozen=True)
class Object:
    """Properties in the schema's order, and no others; `closed` where the schema itself forbids others."""

    where: str
    properties: tuple[Property, ...]
    closed: bool = False


@dataclass(frozen=True)
class Union:
    """Any of the options; none at all is what no value can be."""

    where: str
    options: tuple[Node, ...]


Node = Literals | Integer | Number | String | Array | Object | Union
"""`where` is the JSON pointer of a node in its schema."""


def is_never(node: Node | None) -> bool:
    """Whether no value fits."""
    return isinstance(node, Union) and not node.options


def options_of(node: Node) -> list[Node]:
    """A union's options, those of unions in it too; any other node by itself."""
    return [o for option in node.options for o in options_of(option)] if isinstance(node, Union) else [node]
