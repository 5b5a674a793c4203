"""A column of a record batch to Python values, where a value that cannot be one is its own row's fault."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, cast

import pyarrow as pa
import pyarrow.types as types

from batchrun.errors import FaultCode, InputError, RowFault

Message = dict[str, Any]


def values(array: pa.Array) -> list[Any]:
    """(rows,) values; None for a null, a RowFault for one that is not valid text or has no Python
    counterpart."""
    if types.is_dictionary(array.type):
        array = array.dictionary_decode()
    try:
        if types.is_string(array.type) or types.is_large_string(array.type):
            # Four times as fast as to_pylist.
            return cast(list[Any], array.to_numpy(zero_copy_only=False).tolist())
        return cast(list[Any], array.to_pylist())
    except (pa.ArrowException, ValueError, OverflowError):
        return [_value(scalar) for scalar in array]


def conversations(array: pa.Array) -> list[list[Message] | RowFault | None]:
    """(rows,) lists of messages from a list<struct<role, content, ...>> column; None for a null, a RowFault
    where a message has a null or undecodable field. Fields other than role and content are left out where
    they are null."""
    if types.is_fixed_size_list(array.type):
        array = array.cast(pa.large_list(array.type.value_type))
    offsets = array.offsets.to_numpy()
    items = array.values.slice(offsets[0], offsets[-1] - offsets[0])
    names = [field.name for field in items.type]
    fields = dict(zip(names, map(values, items.flatten()), strict=True))
    roles, contents = fields.pop("role"), fields.pop("content")
    messages = [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]
    for name, extra in fields.items():
        for message, value in zip(messages, extra, strict=True):
            if value is not None:
                message[name] = value
    bounds = (offsets - offsets[0]).tolist()
    rows: list[Any] = [messages[start:end] for start, end in pairwise(bounds)]
    if array.null_count:
        rows = [row if valid else None for row, valid in zip(rows, array.is_valid().to_pylist(), strict=True)]
    if all(isinstance(text, str) for text in (*roles, *contents)) and not fields:
        return rows
    return [row if row is None else _checked(row) for row in rows]


def holds_text(kind: pa.DataType) -> bool:
    """Whether a column of this type holds texts; one that is all null holds none, row by row."""
    if types.is_dictionary(kind):
        kind = kind.value_type
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    return bool(is_text or types.is_null(kind))


def holds_texts(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of texts."""
    if types.is_null(kind):
        return True
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    return bool(is_list and holds_text(kind.value_type))


def holds_messages(kind: pa.DataType) -> bool:
    """Whether a column of this type holds lists of structs with the texts role and content."""
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not is_list or not types.is_struct(kind.value_type):
        return False
    item = kind.value_type
    return all(item.get_field_index(n) >= 0 and holds_text(item.field(n).type) for n in ("role", "content"))


def check_prompt_column(name: str, kind: pa.DataType) -> None:
    """Refuses a ready column of which no row could be a prompt.

    Raises:
        InputError: the column holds neither texts nor lists of messages.
    """
    if not holds_text(kind) and not holds_messages(kind):
        raise InputError(
            f"column {name!r} is {kind}, neither text nor a list of role and content structs",
            "prompt.column",
            "use prompt.template or prompt.messages over it, or input.cast",
        )


def null_prompt(column: str) -> RowFault:
    """The fault of a row whose ready prompt is null."""
    return RowFault(FaultCode.NULL_PROMPT, f"column {column!r} is null")


def _value(scalar: pa.Scalar) -> Any:
    try:
        return scalar.as_py()
    except UnicodeDecodeError as error:
        return RowFault(FaultCode.INVALID_UTF8, str(error))
    except (pa.ArrowException, ValueError, OverflowError) as error:
        return RowFault(FaultCode.TEMPLATE_ERROR, f"a value has no Python counterpart ({error})")


def _checked(row: list[Message]) -> list[Message] | RowFault:
    for message in row:
        for name, value in message.items():
            if isinstance(value, RowFault):
                return value
            if name in ("role", "content") and not isinstance(value, str):
                return RowFault(FaultCode.NULL_PROMPT, f"a message's {name} is null")
    return row
