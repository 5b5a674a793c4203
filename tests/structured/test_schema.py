"""What a JSON Schema means here, and what is refused: the keyword, where it stands, what to do instead."""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from batchrun.errors import JobError
from batchrun.structured.answer_format import AnswerFormat, answer_format

NINE_FIELDS = {
    "type": "object",
    "properties": {
        "title": {"type": "string", "maxLength": 60},
        "summary": {"type": "string"},
        "sentiment": {"enum": ["positive", "neutral", "negative"]},
        "score": {"type": "number", "minimum": 0, "maximum": 1},
        "count": {"type": "integer", "minimum": 0},
        "urgent": {"type": "boolean"},
        "tags": {"type": "array", "items": {"type": "string"}, "maxItems": 5},
        "due": {"anyOf": [{"type": "string", "format": "date"}, {"type": "null"}]},
        "customer": {"$ref": "#/$defs/Customer"},
    },
    "required": ["title", "summary", "sentiment", "score", "count", "urgent", "tags", "due"],
    "$defs": {
        "Customer": {
            "type": "object",
            "properties": {"name": {"type": "string"}, "since": {"type": "string", "format": "date-time"}},
            "required": ["name"],
        }
    },
}


def made(**given: Any) -> AnswerFormat:
    wanted = answer_format(**given)
    assert wanted is not None
    return wanted


def accepts(schema: Any, *values: Any) -> list[bool]:
    wanted = made(schema=schema)
    return [wanted.automaton.matches(json.dumps(value, ensure_ascii=False).encode()) for value in values]


def refused(schema: Any) -> str:
    with pytest.raises(JobError) as caught:
        _ = made(schema=schema).automaton
    return str(caught.value)


def test_an_object_has_its_properties_in_order_and_the_required_ones_always() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"type": "integer"}, "b": {"type": "null"}, "c": {"type": "boolean"}},
        "required": ["b"],
    }
    assert (
        accepts(schema, {"a": 1, "b": None, "c": True}, {"b": None, "c": False}, {"a": 0, "b": None})
        == [True] * 3
    )
    assert accepts(schema, {"a": 1}, {"b": None, "a": 1}, {}, {"b": None, "d": 1}) == [False] * 4


def test_nothing_required_allows_the_empty_object() -> None:
    assert (
        accepts({"properties": {"a": {"const": 1}, "b": {"const": 2}}}, {}, {"b": 2}, {"a": 1, "b": 2})
        == [True] * 3
    )


def test_arrays_have_their_bounds_and_first_items() -> None:
    schema = {
        "type": "array",
        "prefixItems": [{"type": "string"}],
        "items": {"type": "integer"},
        "maxItems": 3,
    }
    assert accepts(schema, [], ["a"], ["a", 1, 2]) == [True] * 3
    assert accepts(schema, [1], ["a", "b"], ["a", 1, 2, 3]) == [False] * 3
    assert accepts({"type": "array", "items": {"const": 0}, "minItems": 2}, [0], [0] * 2, [0] * 9) == [
        False,
        True,
        True,
    ]


def test_what_allof_and_refs_say_holds_at_once() -> None:
    schema = {
        "allOf": [
            {"$ref": "#/$defs/a"},
            {"properties": {"x": {"maximum": 5}, "y": {"type": "null"}}, "required": ["y"]},
        ],
        "$defs": {"a": {"type": "object", "properties": {"x": {"type": "integer", "minimum": 3}}}},
    }
    assert accepts(schema, {"x": 3, "y": None}, {"y": None}) == [True] * 2
    assert accepts(schema, {"x": 2, "y": None}, {"x": 6, "y": None}, {"x": 3}) == [False] * 3


def test_anyof_beside_properties_is_every_case_of_it() -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"const": 1}, "b": {"const": 2}},
        "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
    }
    assert accepts(schema, {"a": 1}, {"b": 2}, {"a": 1, "b": 2}, {}) == [True, True, True, False]


def test_oneof_needs_options_that_exclude_each_other() -> None:
    def options(*kinds: str) -> dict[str, Any]:
        return {
            "oneOf": [
                {"properties": {"kind": {"const": k}, "x": {"type": "null"}}, "required": ["kind"]}
                for k in kinds
            ]
        }

    assert accepts(options("a", "b"), {"kind": "a"}, {"kind": "b", "x": None}) == [True] * 2
    assert "oneOf" in refused({"properties": {"v": options("a", "a")}})
    assert "at /properties/v" in refused({"properties": {"v": options("a", "a")}})


def test_dates_are_days_that_there_are() -> None:
    schema = {"type": "string", "format": "date"}
    assert accepts(schema, "2024-02-29", "2000-02-29", "0001-01-01", "9999-12-31") == [True] * 4
    assert (
        accepts(schema, "2023-02-29", "1900-02-29", "2024-04-31", "2024-13-01", "0000-01-01") == [False] * 5
    )


@pytest.mark.parametrize(
    ("schema", "where", "what", "fix"),
    [
        ({"properties": {"a": {"not": {}}}}, "/properties/a", "not", "enum"),
        ({"type": "object", "patternProperties": {}}, "/", "patternProperties", "array of objects"),
        (
            {"type": "array", "items": {"type": "null"}, "uniqueItems": True},
            "/",
            "uniqueItems",
            "leave it out",
        ),
        ({"properties": {"a/b": {"if": {}}}}, "/properties/a~1b", "if", "anyOf"),
        ({"properties": {"a": {}}}, "/properties/a", "any value", "type"),
        ({"type": "object"}, "/", "without properties", "declare"),
        ({"type": "array"}, "/", "array of any values", "items"),
        ({"type": "string", "format": "email"}, "/", "email", "pattern"),
        ({"type": "string", "pattern": "(?=a)"}, "/", "look-ahead", "leave it out"),
        ({"type": "number", "multipleOf": 0.01}, "/", "multipleOf", "integer"),
        ({"type": "strng"}, "/", "strng", "string"),
        ({"type": "string", "maxlength": 3}, "/", "maxLength", "correct"),
        ({"$ref": "#"}, "/", "no value", "exclude"),
        ({"properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "/", "no value", "exclude"),
        (
            {"oneOf": [{"type": "null"}, {"properties": {"a": {"$ref": "#"}}}]},
            "/oneOf",
            "oneOf in a schema with a recursive $ref",
            "anyOf",
        ),
        ({"$ref": "other.json"}, "/", "out of the schema", "$defs"),
        ({"$ref": "#/$defs/x"}, "/", "not there", "$defs"),
        ({"properties": {"a": {"const": 1}}, "required": ["b"]}, "/", "'b'", "properties"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "/", "no value", "bounds"),
        (
            {"properties": {"a": {"type": "string", "maxLength": 9000}}},
            "/properties/a",
            "too many states",
            "maxLength",
        ),
    ],
)
def test_a_refusal_names_the_keyword_where_it_stands_and_what_to_do(
    schema: Any, where: str, what: str, fix: str
) -> None:
    message = refused(schema)
    assert message.startswith(f"answer.schema at {where}: ")
    assert "\n" not in message
    assert what in message
    assert fix in message


TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {
                "name": {"type": "string", "maxLength": 9},
                "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
            },
            "required": ["name", "children"],
        }
    },
    "$ref": "#/$defs/node",
}


def test_documents_of_a_recursive_schema_nest_as_deep_as_told_and_no_deeper() -> None:
    wanted = answer_format(schema=TREE)
    assert wanted is not None
    assert wanted.levels is not None
    assert wanted.levels >= 4

    def tree(levels: int, children: int) -> dict[str, Any]:
        below = [tree(levels - 1, children) for _ in range(children)] if levels > 1 else []
        return {"name": f"n{levels}", "children": below}

    for levels in range(1, wanted.levels + 3):
        for children in (1, 2):
            text = json.dumps(tree(levels, children))
            assert wanted.automaton.matches(text.encode()) == (levels <= wanted.levels), levels
    deepest = tree(wanted.levels, 1)
    column = wanted.values([json.dumps(deepest), None])
    assert column.to_pylist() == [deepest, None]
    assert column.type.field("children").type.value_type.field("name").type == pa.string()


def test_a_recursive_schema_whose_options_have_no_common_type_is_kept_as_json() -> None:
    number = {"type": "number"}
    pair = {"type": "array", "items": {"$ref": "#"}, "minItems": 2, "maxItems": 2}
    wanted = answer_format(schema={"anyOf": [number, pair]})
    assert wanted is not None
    assert wanted.type == pa.string()
    assert wanted.automaton.matches(b"[1, [2, 3]]")
    assert not wanted.automaton.matches(b"[1, [2]]")


def test_columns_have_the_types_of_the_schema() -> None:
    wanted = made(schema=NINE_FIELDS)
    assert wanted.automaton.states < 1200
    labels = pa.dictionary(pa.int32(), pa.string())
    customer = pa.struct({"name": pa.string(), "since": pa.timestamp("us", "UTC")})
    assert wanted.type == pa.struct(
        {
            "title": pa.string(), "summary": pa.string(), "sentiment": labels, "score": pa.float64(),
            "count": pa.int64(), "urgent": pa.bool_(), "tags": pa.list_(pa.string()), "due": pa.date32(),
            "customer": customer,
        }
    )  # fmt: skip


def test_typed_answers_survive_parquet_and_the_way_back_to_text(tmp_path: Any) -> None:
    wanted = made(schema=NINE_FIELDS)
    value = {
        "title": 'é "q"', "summary": "", "sentiment": "neutral", "score": 0.25, "count": 7, "urgent": False,
        "tags": ["a", "b"], "due": "2024-02-29", "customer": {"name": "n", "since": "2024-01-01T00:00:00+02:00"},
    }  # fmt: skip
    texts = [json.dumps(value, ensure_ascii=False), None, json.dumps({**value, "title": "", "due": None})]
    assert wanted.faults([texts[0], texts[2]], [True, True]) == [None, None]
    column = wanted.values(texts)
    pq.write_table(pa.table({"answer": column}), tmp_path / "part.parquet")
    back = pq.read_table(tmp_path / "part.parquet")["answer"]
    assert back.type == column.type
    assert back.to_pylist() == column.to_pylist()
    assert wanted.values(wanted.texts(back)).equals(column)


def test_what_has_no_common_type_is_kept_as_json() -> None:
    wanted = made(
        schema={"properties": {"v": {"type": ["string", "integer"]}, "n": {"type": ["integer", "number"]}}}
    )
    assert wanted.values(['{"v": "a", "n": 1}', '{"v": 1, "n": 0.5}']).to_pylist() == [
        {"v": '"a"', "n": 1.0},
        {"v": "1", "n": 0.5},
    ]


def test_choices_and_expressions_are_texts() -> None:
    labels = made(choices=["yes", "no", "no idea"])
    code = made(regex=r"[A-Z]{2}\d")
    assert labels.type == pa.dictionary(pa.int32(), pa.string())
    assert code.type == pa.string()
    assert labels.faults(["no", "no", "n", "no idea"], [True, False, True, False]) == [
        None, "the answer was cut before its end", "the answer is not of the wanted form", None,
    ]  # fmt: skip
    assert labels.values(["no", None]).to_pylist() == ["no", None]
    assert code.faults(["AB1", "AB"], [True, True]) == [None, "the answer is not of the wanted form"]
