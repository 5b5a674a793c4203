"""From a JSON Schema to its tree, or to a refusal that names the keyword, where it stands, and an alternative."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any
from urllib.parse import unquote

from batchrun.errors import JobError
from batchrun.structured.decimals import INT64, tightest
from batchrun.structured.facts import Facts, Place, canonical, facts_of, refusal, type_of
from batchrun.structured.nodes import (
    Array,
    Integer,
    Literals,
    Node,
    Number,
    Object,
    Property,
    String,
    Union,
    is_never,
    options_of,
)
from batchrun.structured.strings import FORMATS, matches

# Nodes of the tree, all refs followed.
MAX_NODES = 20_000
# Options of one value, anyOf inside of anyOf and allOf multiplied out.
MAX_OPTIONS = 256
MAX_MULTIPLE = 1000


def read_schema(schema: Any, levels: int = 1) -> tuple[Node, bool]:
    """The tree of a JSON Schema, and whether it is whole: what a `$ref` stands for may be `levels` deep inside of
    itself, and no deeper. A tree that is not whole may be the one of no value at all.

    Raises:
        JobError: it has something that is not supported, or no value can be valid at any depth.
    """
    try:
        canonical(schema).encode()
    except UnicodeEncodeError:
        raise refusal(
            "half a surrogate pair, which is not a character", "", "write the whole character"
        ) from None
    reader = _Reader(schema, levels)
    node = reader.read((Place(schema, "", ("#",)),))
    if reader.one_of and not reader.is_whole:
        # A tree that ends somewhere takes less than its schema does, and would seem to exclude other options.
        raise refusal("oneOf in a schema with a recursive $ref", reader.one_of, "use anyOf")
    if is_never(node) and reader.is_whole:
        raise no_value()
    return node, reader.is_whole


def no_value() -> JobError:
    """A schema that excludes every value."""
    return refusal("no value can be valid", "", "look for properties or bounds that exclude each other")


class _Reader:
    def __init__(self, root: Any, levels: int) -> None:
        self.root, self.levels = root, levels
        self.nodes = 0
        self.is_whole = True
        self.one_of = ""

    def read(self, places: Sequence[Place]) -> Node:
        """The node of a value that all these schemas are about."""
        self.nodes += 1
        where = places[0].where
        if self.nodes > MAX_NODES:
            raise refusal("the schema is too large", where, "use fewer $refs to the same definitions")
        found = [Facts(where)]
        for place in places:
            found = self._join(found, self._alternatives(place), place.where)
        made = [(facts, self._node(facts)) for facts in found]
        made = [(facts, node) for facts, node in made if not is_never(node)]
        self._check_one_of(made)
        nodes = [node for _, node in made]
        return nodes[0] if len(nodes) == 1 else Union(where, tuple(nodes))

    def _alternatives(self, place: Place) -> list[Facts]:
        """What a schema says, once for each choice that its anyOf and oneOf leave."""
        own = facts_of(place)
        if own is None:
            return []
        found = [own]
        schema = place.schema if isinstance(place.schema, dict) else {}
        if "$ref" in schema:
            target = self._follow(place)
            if target.refs.count(target.refs[-1]) > self.levels:
                self.is_whole = False
                return []
            found = self._join(found, self._alternatives(target), place.where)
        for i, _ in enumerate(self._list(place, "allOf")):
            part = place / "allOf" / i
            found = self._join(found, self._alternatives(part), part.where)
        if "anyOf" in schema:
            options = [
                one
                for i, _ in enumerate(self._list(place, "anyOf"))
                for one in self._alternatives(place / "anyOf" / i)
            ]
            found = self._join(found, options, place.where)
        if "oneOf" in schema:
            inner = place / "oneOf"
            self.one_of = inner.where
            options = [
                replace(one, of_oneof=(*one.of_oneof, (inner.where, i)))
                for i, _ in enumerate(self._list(place, "oneOf"))
                for one in self._alternatives(inner / i)
            ]
            found = self._join(found, options, place.where)
        return found

    def _join(self, found: list[Facts], others: list[Facts], where: str) -> list[Facts]:
        if len(found) * len(others) > MAX_OPTIONS:
            raise refusal("too many combinations of anyOf and oneOf", where, "use fewer options")
        joined = [one.joined(other) for one in found for other in others]
        return [one for one in joined if one is not None]

    def _list(self, place: Place, word: str) -> list[Any]:
        value = place.schema.get(word, []) if isinstance(place.schema, dict) else []
        if not isinstance(value, list) or (word in place.schema and not value):
            raise refusal(f"{word} is not a list of schemas", place.where, "give at least one schema")
        return value

    def _follow(self, place: Place) -> Place:
        ref = place.schema["$ref"]
        fix = "use $ref to #/$defs/NAME in the same schema"
        if not isinstance(ref, str) or not (ref == "#" or ref.startswith("#/")):
            raise refusal(f"$ref to {ref!r} leads out of the schema", place.where, fix)
        target = self.root
        for key in ref[2:].split("/") if len(ref) > 2 else []:
            key = unquote(key).replace("~1", "/").replace("~0", "~")
            if isinstance(target, dict) and key in target:
                target = target[key]
            elif isinstance(target, list) and key.isdigit() and int(key) < len(target):
                target = target[int(key)]
            else:
                raise refusal(f"$ref to {ref!r}, which is not there", place.where, fix)
        return Place(target, ref[1:], (*place.refs, ref))

    def _node(self, facts: Facts) -> Node:
        if facts.values is not None:
            return (
                Literals(facts.where, tuple(v for v in facts.values if self._fits(v, facts)))
                if any(self._fits(v, facts) for v in facts.values)
                else Union(facts.where, ())
            )
        types = facts.types if facts.types is not None else facts.implied
        if not types:
            raise refusal("any value would be allowed", facts.where, "give a type")
        if "number" in types:
            types = types - {"integer"}
        made = [self._typed(kind, facts) for kind in sorted(types, key=_ORDER.index)]
        made = [node for node in made if not is_never(node)]
        return made[0] if len(made) == 1 else Union(facts.where, tuple(made))

    def _typed(self, kind: str, facts: Facts) -> Node:
        where = facts.where
        match kind:
            case "null":
                return Literals(where, (None,))
            case "boolean":
                return Literals(where, (True, False))
            case "integer":
                return self._integer(facts)
            case "number":
                if facts.multiples:
                    fix = "use type: integer, in a smaller unit where it has to be"
                    raise refusal("multipleOf is supported for integers only", where, fix)
                low, high = tightest(facts.lows, False), tightest(facts.highs, True)
                if (
                    low
                    and high
                    and (
                        low.value > high.value
                        or (low.value == high.value and not (low.inclusive and high.inclusive))
                    )
                ):
                    return Union(where, ())
                return Number(where, low, high)
            case "string":
                for name in facts.formats:
                    if name not in FORMATS:
                        fix = f"leave it out, use pattern, or one of {', '.join(FORMATS)}"
                        raise refusal(f"format {name!r} is not supported", where, fix)
                if facts.max_length is not None and facts.max_length < facts.min_length:
                    return Union(where, ())
                return String(where, facts.min_length, facts.max_length, facts.patterns, facts.formats)
            case "array":
                return self._array(facts)
        return self._object(facts)

    def _integer(self, facts: Facts) -> Node:
        low, high = INT64
        for bound in facts.lows:
            low = max(low, math.ceil(bound.value) + (not bound.inclusive and bound.value == int(bound.value)))
        for bound in facts.highs:
            high = min(
                high, math.floor(bound.value) - (not bound.inclusive and bound.value == int(bound.value))
            )
        for multiple in facts.multiples:
            if multiple != int(multiple):
                raise refusal(
                    "multipleOf of an integer is not a whole number", facts.where, "give a whole one"
                )
        multiple = math.lcm(*(int(m) for m in facts.multiples)) if facts.multiples else 1
        if multiple > MAX_MULTIPLE:
            raise refusal(f"multipleOf above {MAX_MULTIPLE}", facts.where, "leave it out")
        if -(-low // multiple) * multiple > high:
            return Union(facts.where, ())
        return Integer(facts.where, low, high, multiple)

    def _array(self, facts: Facts) -> Node:
        prefix = [self.read(places) for places in facts.prefix]
        least, most = facts.min_items, facts.max_items
        if facts.items:
            items: Node | None = self.read(facts.items)
        elif facts.prefix:
            # More items of any kind would be valid, too; the declared ones are those that are wanted.
            items = None
        elif most == 0:
            items = None
        else:
            raise refusal("an array of any values", facts.where, "give its items a type")
        if items is None or is_never(items):
            items = None
        ends = next((i for i, node in enumerate(prefix) if is_never(node)), None)
        if ends is not None:
            prefix, items = prefix[:ends], None
        if items is None:
            most = len(prefix) if most is None else min(most, len(prefix))
        if most is not None and most < least:
            return Union(facts.where, ())
        return Array(facts.where, tuple(prefix[:most]), items, least, most)

    def _object(self, facts: Facts) -> Node:
        for name in facts.required:
            if name not in facts.properties:
                fix = "declare it in properties"
                raise refusal(f"required names {name!r}, which properties does not", facts.where, fix)
        made = []
        for name, places in facts.properties.items():
            also = [one.place for one in facts.additional if name not in one.names]
            if name not in facts.required and any(place.schema is False for place in (*places, *also)):
                continue
            value = self.read((*places, *also))
            required = name in facts.required
            if not is_never(value):
                made.append(Property(name, value, required))
            elif required:
                return Union(facts.where, ())
        if not made and facts.properties and not self.is_whole:
            return Union(facts.where, ())
        if not made:
            fix = "declare its properties, or use an array of objects with a name and a value"
            raise refusal("an object without properties", facts.where, fix)
        closed = any(one.place.schema is False for one in facts.additional)
        return Object(facts.where, tuple(made), closed)

    def _fits(self, value: Any, facts: Facts) -> bool:
        """Whether a value of an enum is what the keywords beside it allow."""
        kind = type_of(value)
        if (
            facts.types is not None
            and kind not in facts.types
            and not (kind == "integer" and "number" in facts.types)
        ):
            return False
        if kind in ("integer", "number"):
            exact = float(value) if isinstance(value, float) else value
            return (
                all(b.value < exact or (b.inclusive and b.value == exact) for b in facts.lows)
                and all(b.value > exact or (b.inclusive and b.value == exact) for b in facts.highs)
                and all(exact % m == 0 for m in facts.multiples)
            )
        if kind == "string":
            node = String(facts.where, facts.min_length, facts.max_length, facts.patterns, facts.formats)
            return matches(node, value)
        if kind in facts.implied:
            fix = "leave the other keywords out: the values say it all"
            raise refusal(f"enum of {kind}s beside other keywords", facts.where, fix)
        return True

    def _check_one_of(self, made: list[tuple[Facts, Node]]) -> None:
        for (facts, node), (others, other) in combinations(made, 2):
            theirs = dict(others.of_oneof)
            for where, option in facts.of_oneof:
                if theirs.get(where, option) != option and not (
                    _rejects(node, other) and _rejects(other, node)
                ):
                    fix = "use anyOf, or require a property with a const of its own in each"
                    raise refusal("a value may fit several of oneOf", where.removesuffix("/oneOf"), fix)


_ORDER = ("object", "array", "string", "number", "integer", "boolean", "null")


def _rejects(judge: Node, node: Node) -> bool:
    """Whether nothing that is generated for `node` is valid for `judge`; False where that is not sure."""
    if isinstance(judge, Union) or isinstance(node, Union):
        return all(_rejects(a, b) for a in options_of(judge) for b in options_of(node))
    if isinstance(judge, Literals) and isinstance(node, Literals):
        return not any(a == b and type_of(a) == type_of(b) for a in judge.values for b in node.values)
    if not _kinds(judge) & _kinds(node):
        return True
    match judge, node:
        case ((Integer() | Number()), (Integer() | Number())):
            low, high = max(_low(judge), _low(node)), min(_high(judge), _high(node))
            return bool(low > high)
        case Object(), Object():
            return _rejects_object(judge, node)
        case String(), Literals(values=values):
            return not judge.patterns and not any(isinstance(v, str) and matches(judge, v) for v in values)
        case Literals(values=values), String():
            return not node.patterns and not any(isinstance(v, str) and matches(node, v) for v in values)
    return False


def _rejects_object(judge: Object, node: Object) -> bool:
    theirs = {one.name: one for one in judge.properties}
    ours = {one.name: one for one in node.properties}
    if any(one.required and name not in ours for name, one in theirs.items()):
        return True
    if judge.closed and any(one.required and name not in theirs for name, one in ours.items()):
        return True
    return any(
        (theirs[name].required or ours[name].required) and _rejects(theirs[name].value, ours[name].value)
        for name in theirs.keys() & ours.keys()
    )


def _kinds(node: Node) -> set[str]:
    match node:
        case Literals(values=values):
            return {type_of(value).replace("integer", "number") for value in values}
        case Integer() | Number():
            return {"number"}
    return {type(node).__name__.lower()}


def _low(node: Integer | Number) -> float:
    low = node.low if isinstance(node, Integer) else node.low and node.low.value
    return -math.inf if low is None else float(low)


def _high(node: Integer | Number) -> float:
    high = node.high if isinstance(node, Integer) else node.high and node.high.value
    return math.inf if high is None else float(high)
