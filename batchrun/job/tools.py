"""Tool definitions for a chat template, in OpenAI's form or as the function alone, and what is wrong with them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any


def tools_fault(tools: Sequence[Any]) -> str | None:
    """What is wrong with these tools, if anything: each is a mapping that names a function, in plain JSON values."""
    for i, tool in enumerate(tools):
        if not isinstance(tool, dict):
            return f"tool {i} is {_kind(tool)}, not a mapping such as {{type: function, function: {{name: ...}}}}"
        function = tool.get("function", tool)
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name:
            return f"tool {i} has no name: write {{type: function, function: {{name: ...}}}}"
    return not_json(tools)


def not_json(value: Any) -> str | None:
    """Why a value cannot be written as JSON, if it cannot."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        return f"only JSON values can be given here ({error})"
    return None


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
