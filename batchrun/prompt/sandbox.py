"""The Jinja environment of the job's own templates: no way out into Python, and a null that never becomes a word."""

from __future__ import annotations

from typing import Any

from jinja2 import StrictUndefined, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Bytes of the process that renders.
MEMORY = 1 << 30
# Characters of one text.
TEXT = 64 << 20

TOO_LARGE = (
    f"rendering takes more than {MEMORY >> 30} GiB of memory, or gives more than {TEXT >> 20} Mi characters"
)
NULL_PRINTED = "the template prints a null value"


class NullPrinted(Exception):
    """A template makes text of a value that is null."""


class _Null:
    """A null column: false, equal to none, and never text. Plain None would become "None" in any filter."""

    def __bool__(self) -> bool:
        return False

    def __eq__(self, other: object) -> bool:
        return other is None or isinstance(other, _Null)

    def __hash__(self) -> int:
        return hash(None)

    def __str__(self) -> str:
        raise NullPrinted


NULL = _Null()


@pass_context
def _printed(context: Context, value: Any) -> Any:
    if value is None:
        raise NullPrinted
    return value


def _as_json(value: object) -> None:
    if not isinstance(value, _Null):
        raise TypeError(f"{type(value).__name__} is not JSON serializable")


# Not optimized, and with a finalize that depends on the context: no expression is computed while compiling.
ENVIRONMENT = ImmutableSandboxedEnvironment(
    undefined=StrictUndefined,
    finalize=_printed,
    keep_trailing_newline=True,
    autoescape=False,
    optimized=False,
)
# Any other global would hide a column of its name.
ENVIRONMENT.globals = {name: ENVIRONMENT.globals[name] for name in ("range", "namespace")}
ENVIRONMENT.tests["none"] = lambda value: value is None or value is NULL
ENVIRONMENT.policies["json.dumps_kwargs"] = {"default": _as_json, "ensure_ascii": False}
