"""A column with each row's tools, where a value that is not a list of tools is its own row's fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from batchrun.errors import FaultCode, InputError, RowFault
from batchrun.job.tools import tools_fault
from batchrun.prompt.columns import holds_text, values

Tools = list[dict[str, Any]]

# Levels of lists and mappings in a row's tools; those of a JSON Schema are a few.
DEEPEST = 64


def check_tools_column(name: str, kind: pa.DataType) -> None:
    """Refuses a column of which no row could be a list of tools.

    Raises:
        InputError: the column holds neither texts nor lists of structs.
    """
    is_list = types.is_list(kind) or types.is_large_list(kind) or types.is_fixed_size_list(kind)
    if not holds_text(kind) and not (is_list and types.is_struct(kind.value_type)):
        raise InputError(
            f"column {name!r} is {kind}, neither JSON text nor a list of structs",
            "prompt.tools.column",
            "use a column of JSON lists, or input.cast",
        )


def tools_of(name: str, column: pa.Array, guard: Callable[[Any], Any]) -> list[Tools | RowFault | None]:
    """(rows,) tools, every text in them through `guard`; None for a null, a RowFault for what is not a list of tools.
    Fields of structs are left out where they are null."""
    is_text = holds_text(column.type)
    known: dict[str, Tools | RowFault | None] = {}

    def tools(value: Any) -> Tools | RowFault | None:
        if value is None or isinstance(value, RowFault):
            return value
        try:
            found = _plain(json.loads(value), 0) if is_text else _plain(value, 0, without_nulls=True)
        except (ValueError, RecursionError) as error:
            return _fault(name, f" cannot be read as tools ({error})")
        if found is None:
            return None
        if not isinstance(found, list):
            return _fault(name, " is not a list of tools")
        fault = tools_fault(found)
        return _fault(name, f": {fault}") if fault else guard(found)

    def tools_once(text: Any) -> Tools | RowFault | None:
        """As most rows have the same few lists of tools, each is read once."""
        if not isinstance(text, str):
            return tools(text)
        if text not in known:
            known[text] = tools(text)
        return known[text]

    return [tools_once(value) for value in values(column)]


def _fault(name: str, what: str) -> RowFault:
    return RowFault(FaultCode.INVALID_TOOLS, f"column {name!r}{what}")


def _plain(value: Any, depth: int, without_nulls: bool = False) -> Any:
    """The value as JSON has it: Arrow's maps, lists of pairs in Python, as mappings."""
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} levels deep")
    if isinstance(value, list) and value and all(isinstance(item, tuple) for item in value):
        value = dict(value)
    if isinstance(value, list):
        return [_plain(item, depth + 1, without_nulls) for item in value]
    if isinstance(value, dict):
        return {
            key: _plain(item, depth + 1, without_nulls)
            for key, item in value.items()
            if item is not None or not without_nulls
        }
    return value
