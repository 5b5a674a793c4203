"""Which rows are kept: the job's filters, checked once and applied to record batches."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from functools import reduce
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from batchrun.errors import InputError, first_line, nearest

_WHERE = "input.filters"
_COMPARE: dict[str, tuple[Callable[..., Any], Callable[[Any, Any], Any]]] = {
    "=": (pc.equal, operator.eq),
    "==": (pc.equal, operator.eq),
    "!=": (pc.not_equal, operator.ne),
    "<": (pc.less, operator.lt),
    "<=": (pc.less_equal, operator.le),
    ">": (pc.greater, operator.gt),
    ">=": (pc.greater_equal, operator.ge),
}
_OPERATORS = (*_COMPARE, "in", "not in")


class Term(NamedTuple):
    """One condition; `value` is a scalar, or an array for `in` and `not in`."""

    column: str
    op: str
    value: Any

    def holds(self, values: pa.Array) -> pa.Array:
        """(rows,) booleans, null where the comparison with a null is."""
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if self.op in _COMPARE:
            return _COMPARE[self.op][0](values, self.value)
        found = pc.is_in(values, value_set=self.value)
        return found if self.op == "in" else pc.invert(found)

    def expression(self) -> pc.Expression:
        """The same as an expression of pyarrow's, for readers that filter by themselves."""
        field = pc.field(self.column)
        if self.op in _COMPARE:
            return _COMPARE[self.op][1](field, self.value)
        return field.isin(self.value) if self.op == "in" else ~field.isin(self.value)


class Filters:
    """Conditions in disjunctive normal form, with the meaning that `pyarrow.parquet.read_table(filters=)`
    gives them: a row is kept when all terms of any group hold; an unknown (null) comparison does not hold."""

    def __init__(self, groups: list[list[Term]]) -> None:
        self.groups = groups
        self.columns = list(dict.fromkeys(term.column for group in groups for term in group))

    def mask(self, batch: pa.RecordBatch) -> NDArray[np.bool_]:
        """(rows,) True for the rows that are kept."""
        any_of = reduce(pc.or_kleene, (self._all_of(group, batch) for group in self.groups))
        return np.asarray(pc.fill_null(any_of, False).to_numpy(zero_copy_only=False), np.bool_)

    def expression(self) -> pc.Expression:
        """The same condition for pyarrow.dataset, which knows how to hold it against row-group statistics."""
        return reduce(operator.or_, (reduce(operator.and_, (t.expression() for t in g)) for g in self.groups))

    def _all_of(self, group: list[Term], batch: pa.RecordBatch) -> pa.Array:
        return reduce(pc.and_kleene, (term.holds(batch.column(term.column)) for term in group))


def parse_filters(filters: list[Any] | None, schema: pa.Schema) -> Filters | None:
    """Filters from the job's lists `[[column, op, value], ...]` (all hold), or a list of such lists (any
    holds).

    Raises:
        InputError: names the condition that has the wrong shape, an unknown column or operator, or a value
            that cannot be compared with its column.
    """
    if not filters:
        return None
    groups = [filters] if _is_term(filters[0]) else filters
    return Filters([[_parse_term(term, schema) for term in _checked_group(group)] for group in groups])


def key_filters(filters: list[Any] | None, keys: pa.Schema) -> Filters:
    """The conditions on the columns of `keys` alone, group by group. Raises as `parse_filters`."""
    groups = [filters] if filters and _is_term(filters[0]) else filters or []
    return Filters(
        [
            [_parse_term(t, keys) for t in _checked_group(g) if _checked_term(t)[0] in keys.names]
            for g in groups
        ]
    )


def filter_columns(filters: list[Any] | None) -> list[str]:
    """The columns that filters read, before any schema is known."""
    if not filters:
        return []
    groups = [filters] if _is_term(filters[0]) else filters
    terms = (_checked_term(term) for group in groups for term in _checked_group(group))
    return list(dict.fromkeys(column for column, _, _ in terms))


def _is_term(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) > 0 and isinstance(value[0], str)


def _checked_group(group: Any) -> Iterable[Any]:
    if not isinstance(group, list | tuple) or not group or isinstance(group[0], str):
        raise InputError(f"{group!r} is not a list of conditions", _WHERE, "write [[column, op, value], ...]")
    return group


def _checked_term(term: Any) -> tuple[str, str, Any]:
    if not _is_term(term) or len(term) != 3:
        raise InputError(f"{term!r} is not a condition", _WHERE, "write [column, op, value]")
    column, op, value = term
    if op not in _OPERATORS:
        raise InputError(
            f"unknown operator {op!r} for {column}", _WHERE, f"use one of {', '.join(_OPERATORS)}"
        )
    if op in ("in", "not in") and not isinstance(value, list | tuple | set | frozenset):
        what = f"{column} {op} needs a list of values (got {value!r})"
        raise InputError(what, _WHERE, f"write [{column}, {op}, [{value}]]")
    if value is None:
        raise InputError(f"{column} {op} null holds for no row", _WHERE, "compare with a value")
    return column, op, value


def _parse_term(term: Any, schema: pa.Schema) -> Term:
    column, op, value = _checked_term(term)
    if column not in schema.names:
        raise InputError(f"no column {column!r}{nearest(column, schema.names)}", _WHERE)
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    try:
        literal = pa.array(sorted(value, key=repr)) if op in ("in", "not in") else pa.scalar(value)
        # Dates, times and decimals stand as text in a job file.
        if (op in ("in", "not in") or pa.types.is_string(literal.type)) and literal.type != kind:
            literal = literal.cast(kind)
        parsed = Term(column, op, literal)
        parsed.holds(pa.array([], kind))
    except (pa.ArrowException, OverflowError, TypeError) as error:
        reason = first_line(error)
        raise InputError(
            f"{column} is {kind}, which {value!r} cannot be compared with ({reason})",
            _WHERE,
            "give a value of that type, or filter on another column",
        ) from None
    return parsed
