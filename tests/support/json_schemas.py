"""Random JSON Schemas of the supported kind, values for them, and answers by random tokens."""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np

from batchrun.structured.tokens import ENDED, TokenAutomaton
from batchrun.structured.vocabulary import Vocabulary

# Single bytes, pieces of JSON, and characters in halves.
TOKENS = [
    *(bytes([i]) for i in range(256)),
    *(
        text.encode()
        for text in (
            '"', '{"', '", "', '": ', '": "', '","', ",", ", ", '"}', "]", "[{", '": [', "null", "true", "false", ' "',
            "ab", 'a"', "é", "日", "\\n", '\\"', "12", "0.", "-1", "20", "T", "00", ":0", "Z", "-0", '"a', '"b": ',
            "}]", '": {"', '", "b": ',
        )
    ),
    *(b"\xe6\x97", b"\xc3", b'\xa9"', b'\x8e\x89"'),
]  # fmt: skip
END = len(TOKENS)
VOCABULARY = Vocabulary([*TOKENS, None])

_TEXT = 'abcXYZ019 _-"\\\n\té日🎉/{}[],:'
_PATTERNS = {
    r"^[A-Z]{2}\d{3}$": ("AB123", "XY000"),
    r"^a|b$": ("a", "abc", "xb", '"b'),
    r"\d+": ("1", "a12 é"),
    r"^(foo|bar)+x?$": ("foo", "foobarx"),
    r"^[^\"\\]{1,3}$": ("é", "a b"),
    r"é|[à-ü]{2}": ("caféx", "àü"),
    r"^\w+@\w+\.com$": ("a@b.com",),
    r"^.{0,3}$": ("", "日é\\"),
    r"\s": (" ", "a\tb"),
}
_FORMATS = {
    "date": "2024-02-29",
    "date-time": "1999-12-31T23:59:59.5+05:30",
    "time": "00:00:00Z",
    "uuid": "12345678-1234-5678-1234-56781234567a",
}


def random_schema(r: random.Random) -> dict[str, Any]:
    """A schema with two definitions that it may refer to."""
    schema = _schema(r, 0)
    schema["$defs"] = {"D0": _schema(r, 2, refs=False), "D1": _schema(r, 3, refs=False)}
    return schema


def recursive_schema(r: random.Random) -> dict[str, Any]:
    """Two definitions that refer to themselves and to each other, beside values of other kinds."""

    def again() -> dict[str, Any]:
        ref = {"$ref": f"#/$defs/D{r.randrange(2)}"}
        return r.choice(
            [
                ref,
                {"type": "array", "items": ref, "maxItems": r.randrange(1, 4)},
                {"type": "array", "items": ref},
                {"anyOf": [{"type": "null"}, ref]},
                {"type": "object", "properties": {"x": ref, "y": _schema(r, 3)}, "required": ["y"]},
            ]
        )

    def definition() -> dict[str, Any]:
        members = [("f", _schema(r, 3)), ("g", again()), *([("h", again())] if r.random() < 0.3 else [])]
        r.shuffle(members)
        required = [name for name, _ in members if name == "f" or r.random() < 0.3]
        return {"type": "object", "properties": dict(members), "required": required}

    return {"$ref": "#/$defs/D0", "$defs": {"D0": definition(), "D1": definition()}}


def closed(schema: Any) -> Any:
    """The same without properties and items that are not declared."""
    if isinstance(schema, list):
        return [*map(closed, schema)]
    if not isinstance(schema, dict):
        return schema
    made = {word: value if word in ("enum", "const") else closed(value) for word, value in schema.items()}
    if schema.get("type") == "object" and isinstance(schema.get("properties"), dict):
        made["additionalProperties"] = False
    if isinstance(schema.get("prefixItems"), list):
        made["items"] = made.get("items", False)
    return made


def _schema(r: random.Random, depth: int, refs: bool = True) -> dict[str, Any]:
    flat = [
        "string",
        "string",
        "integer",
        "number",
        "boolean",
        "null",
        "enum",
        "const",
        "format",
        "pattern",
        "nullable",
        "types",
    ]
    deep = ["object", "object", "object", "array", "array", "anyOf", "oneOf", "prefixItems", "allOf"] + [
        "$ref"
    ] * refs
    kind = r.choice(flat + deep if depth < 3 else flat)
    if depth == 0 and r.random() < 0.8:
        kind = "object"

    def inner() -> dict[str, Any]:
        return _schema(r, depth + 1, refs)

    match kind:
        case "string":
            least = r.randrange(4) if r.random() < 0.3 else None
            most = (least or 0) + r.randrange(9) if r.random() < 0.4 else None
            return _given(type="string", minLength=least, maxLength=most)
        case "pattern":
            return {"type": "string", "pattern": r.choice([*_PATTERNS])}
        case "format":
            return {"type": "string", "format": r.choice([*_FORMATS])}
        case "integer" | "number":
            low = r.choice(
                [r.randrange(-1000, 1000), r.randrange(-(10**12), 10**12), round(r.uniform(-5, 5), 2)]
            )
            high = low + r.choice([0, 1, 5, 100, 10**6, 0.5, 0.25])
            bounds = {
                r.choice(["minimum", "exclusiveMinimum", "x-none"]): low,
                r.choice(["maximum", "exclusiveMaximum", "x-none"]): high,
            }
            multiple = {"multipleOf": r.randrange(1, 20)} if kind == "integer" and r.random() < 0.2 else {}
            return {"type": kind, **bounds, **multiple}
        case "boolean" | "null":
            return {"type": kind}
        case "enum":
            return {"enum": [_scalar(r) for _ in range(r.randrange(1, 5))]}
        case "const":
            return {"const": r.choice([_scalar(r), [1, "a"], {"x": None}])}
        case "nullable":
            return {"anyOf": [inner(), {"type": "null"}]}
        case "types":
            return {"type": r.sample(["string", "integer", "number", "boolean", "null"], 2)}
        case "object":
            names = {
                _text(r, 5) if r.random() < 0.3 else r.choice("abcdefgh"): None
                for _ in range(r.randrange(1, 5))
            }
            closed = {"additionalProperties": False} if r.random() < 0.5 else {}
            required = [name for name in names if r.random() < 0.6]
            return {
                "type": "object",
                "properties": {n: inner() for n in names},
                "required": required,
                **closed,
            }
        case "array":
            least = r.randrange(3) if r.random() < 0.4 else None
            most = (least or 0) + r.randrange(3) if r.random() < 0.5 else None
            return _given(type="array", items=inner(), minItems=least, maxItems=most)
        case "prefixItems":
            rest = r.choice([False, inner(), None])
            first = [inner() for _ in range(r.randrange(1, 3))]
            return _given(type="array", prefixItems=first, items=rest, minItems=r.choice([None, 1, 2]))
        case "allOf":
            one = inner()
            return {
                "allOf": [one, r.choice([{"description": "x"}, {"type": one.get("type", "string")}, inner()])]
            }
        case "$ref":
            return {"$ref": f"#/$defs/D{r.randrange(2)}"}
    return {kind: [inner() for _ in range(r.randrange(1, 4))]}


def random_value(r: random.Random, schema: Any, root: dict[str, Any]) -> Any:
    """A value that the schema may allow, with its properties in the schema's order."""
    if not isinstance(schema, dict):
        return None
    for word in ("anyOf", "oneOf", "allOf"):
        if word in schema:
            return random_value(r, r.choice(schema[word]), root)
    if "$ref" in schema:
        return random_value(r, root["$defs"][schema["$ref"][-2:]], root)
    if "const" in schema or "enum" in schema:
        return r.choice(schema.get("enum", [schema.get("const")]))
    kind = schema.get("type")
    match r.choice(kind) if isinstance(kind, list) else kind:
        case "boolean":
            return r.random() < 0.5
        case "integer" | "number" as name:
            bounds = [v for word, v in schema.items() if word.endswith("imum")]
            near = min(bounds, default=r.choice([0, -(1 << 63) + 20, (1 << 63) - 8]))
            if name == "number":
                return r.choice(
                    [near, near + 1, near + r.random(), float(near), round(near + r.random() / 4, 3), -0.0]
                )
            value = int(near) + r.randrange(8)
            return value - value % schema.get("multipleOf", 1)
        case "string":
            if "format" in schema:
                return _FORMATS[schema["format"]]
            if "pattern" in schema:
                return r.choice(_PATTERNS[schema["pattern"]])
            least = schema.get("minLength", 0)
            return _text(r, schema.get("maxLength", least + 6) + 1, least)
        case "array":
            first = schema.get("prefixItems", [])
            some = [random_value(r, one, root) for one in first[: r.randrange(len(first) + 1)]]
            if len(some) == len(first) and schema.get("items", False) is not False:
                least = max(0, schema.get("minItems", 0) - len(some))
                count = r.randrange(least, max(least, schema.get("maxItems", least + 2)) + 1)
                some += [random_value(r, schema["items"], root) for _ in range(count)]
            return some
        case "object":
            required = schema.get("required", [])
            return {
                name: random_value(r, value, root)
                for name, value in schema.get("properties", {}).items()
                if name in required or r.random() < 0.5
            }
    return None


def random_answer(r: random.Random, tokens: TokenAutomaton, limit: int = 400) -> bytes | None:
    """The text of allowed tokens, drawn at random until one of them ends it; None where none does for long."""
    state, answer = tokens.start, b""
    for step in range(limit):
        allowed = np.flatnonzero(tokens.next_state[state][tokens.token_class]).tolist()
        assert allowed, "no token may follow"
        if END in allowed and (len(allowed) == 1 or r.random() < 0.3 or step > 150):
            assert tokens.next_state[state, tokens.token_class[END]] == ENDED
            return answer
        allowed = [token for token in allowed if token != END]
        closing = [token for token in allowed if TOKENS[token][:1] in (b'"', b"}", b"]", b",", b"0")]
        token = r.choice(closing if step > 60 and closing else allowed)
        answer += TOKENS[token]
        state = int(tokens.next_state[state, tokens.token_class[token]])
    return None


def random_tokens(r: random.Random, text: bytes) -> list[int]:
    """Tokens of the text, cut at random."""
    found, place = [], 0
    while place < len(text):
        found.append(r.choice([i for i, token in enumerate(TOKENS) if text.startswith(token, place)]))
        place += len(TOKENS[found[-1]])
    return found


def written(value: Any) -> bytes:
    """The canonical document."""
    return json.dumps(value, ensure_ascii=False).encode()


def with_whole_numbers(value: Any) -> Any:
    """The same with integers in place of floats that are whole."""
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, list):
        return [*map(with_whole_numbers, value)]
    return {k: with_whole_numbers(v) for k, v in value.items()} if isinstance(value, dict) else value


def _scalar(r: random.Random) -> Any:
    return r.choice(
        [None, True, False, r.randrange(-5, 5), r.uniform(-3, 3), _text(r, 6), r.randrange(10**6)]
    )


def _text(r: random.Random, below: int, least: int = 0) -> str:
    return "".join(r.choice(_TEXT) for _ in range(r.randrange(least, max(below, least + 1))))


def _given(**words: Any) -> dict[str, Any]:
    return {word: value for word, value in words.items() if value is not None}
