"""Where the job's templates run: no way out into Python, and a limit to what one row may cost.

Limits are counted in loop turns, calls and characters, not in seconds: a row that is too dear is so on every machine.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import wraps
from math import prod
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

STEPS = 250_000  # loop turns and calls of one row
SIZE = 64 << 20  # characters of a text, or items of a list
BITS = 1 << 16  # of a whole number

# Their result may be as long as the product of what they are given.
_MULTIPLYING = {
    "center",
    "expandtabs",
    "indent",
    "join",
    "ljust",
    "replace",
    "rjust",
    "wordwrap",
    "zfill",
    "batch",
    "slice",
}
# A width of eight digits, or one that stands in an argument.
_WIDE_FORMAT = re.compile(r"\d{8,}|%[-+ #0.\d]*\*|\{[^{}]*\{")


class TooMuch(Exception):
    """A template that would go on for too long, or make too much of a row."""


class Sandbox(ImmutableSandboxedEnvironment):
    """Jinja's own sandbox, with every loop, call, filter and operator that can grow under a limit."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, **how: Any) -> None:
        super().__init__(**how)
        self._spent = threading.local()
        self.filters = {name: _bounded(name, function) for name, function in self.filters.items()}
        self.filters |= {"batchrun counted": self._counted, "batchrun joined": _joined}

    def concat(self, pieces: Iterable[str]) -> str:
        """A template's text of its pieces; every rendering ends here, and each row begins anew."""
        return "".join(self._collected(pieces))

    def begin(self) -> None:
        """Starts a row's account."""
        self._spent.steps = 0

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        __self._step()
        method = getattr(__obj, "__wrapped__", __obj)  # Jinja wraps a text's own format
        name, owner = getattr(method, "__name__", ""), getattr(method, "__self__", None)
        if isinstance(owner, str):
            _check(name, [owner, *args, *kwargs.values()])
        return _fitting(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = (
                left.bit_length() * abs(right) if operator == "**" else left.bit_length() + right.bit_length()
            )
            if bits > BITS:
                raise TooMuch("a number that is too large")
        elif operator == "*":
            _check_product([left, right])
        elif operator == "%" and isinstance(left, str):
            _check("format", [left])
        return _fitting(super().call_binop(context, operator, left, right))

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        for loop in [*source.find_all(nodes.For)]:
            loop.iter = self._filtered(loop.iter, "batchrun counted")
        for concat in [*source.find_all(nodes.Concat)]:
            parts = nodes.List(concat.nodes, lineno=concat.lineno, environment=self)
            concat.nodes = [self._filtered(parts, "batchrun joined")]
        return super()._generate(source, *args, **kwargs)

    def _filtered(self, node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno, environment=self)

    def _step(self) -> None:
        self._spent.steps = steps = getattr(self._spent, "steps", 0) + 1
        if steps > STEPS:
            raise TooMuch(f"more than {STEPS:,} loop turns and calls")

    @property
    def _counted(self) -> Callable[[Context, Iterable[Any]], Iterator[Any]]:
        @pass_context  # so that Jinja never computes it beforehand
        def counted(context: Context, items: Iterable[Any]) -> Iterator[Any]:
            for item in items:
                self._step()
                yield item

        return counted

    def _collected(self, pieces: Iterable[str]) -> Iterator[str]:
        size = 0
        for piece in pieces:
            size += len(piece)
            if size > SIZE:
                raise TooMuch(f"more than {SIZE:,} characters")
            yield piece


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def bounded(*args: Any, **kwargs: Any) -> Any:
        _check(name, [*args, *kwargs.values()])
        return _fitting(function(*args, **kwargs))

    return bounded


def _joined(parts: list[Any]) -> str:
    texts = [str(part) for part in parts]
    if sum(map(len, texts)) > SIZE:
        raise TooMuch(f"more than {SIZE:,} characters")
    return "".join(texts)


def _check(name: str, values: list[Any]) -> None:
    if name in _MULTIPLYING:
        _check_product(values)
    if name in ("format", "format_map") and any(
        isinstance(v, str) and _WIDE_FORMAT.search(v) for v in values
    ):
        raise TooMuch("a format's width")


def _check_product(values: list[Any]) -> None:
    sizes = (
        abs(v) if isinstance(v, int) else len(v) if isinstance(v, str | list | tuple) else 1 for v in values
    )
    if prod(size for size in sizes if size > 1) > SIZE:
        raise TooMuch(f"more than {SIZE:,} characters or items")


def _fitting(value: Any) -> Any:
    if isinstance(value, str | list | tuple | dict) and len(value) > SIZE:
        raise TooMuch(f"more than {SIZE:,} characters or items")
    return value
