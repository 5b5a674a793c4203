"""Settings that columns give each row, where a value that does not fit is its own row's fault."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.types as types

from batchrun.errors import FaultCode, InputError, RowFault, nearest
from batchrun.job.generation import GenerationSettings, RowSettings
from batchrun.job.settings import ModelSettings
from batchrun.prompt.columns import holds_text, holds_texts, values


def row_columns(generation: GenerationSettings, model: ModelSettings) -> dict[str, str]:
    """The settings that a column gives each row, each with its column."""
    adapter = {} if model.adapter_column is None else {"adapter": model.adapter_column}
    return {**generation.columns, **adapter}


class RowSettingsReader:
    """The job's settings for each row of a batch. `columns` are the ones it reads.

    Raises:
        InputError: a column that the schema lacks, or of a type of which no value could be the setting.
    """

    def __init__(
        self, generation: GenerationSettings, model: ModelSettings, schema: pa.Schema, context: int
    ) -> None:
        self._defaults, self._context = generation.defaults, context
        self._columns = row_columns(generation, model)
        self._adapters = {name: number for number, name in enumerate(model.adapters or (), 1)}
        self._read = {**_READ, "adapter": self._adapter}
        self.columns = list(dict.fromkeys(self._columns.values()))
        for setting, column in self._columns.items():
            _check(setting, column, schema)
        self._known: dict[RowSettings, RowSettings] = {}

    def read(self, batch: pa.RecordBatch) -> list[RowSettings | RowFault]:
        """(rows,) The rows' settings; rows with the same ones share an object."""
        columns = {name: values(batch.column(column)) for name, column in self._columns.items()}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        return [self._of(row) for row in rows]

    def _of(self, row: dict[str, Any]) -> RowSettings | RowFault:
        given: dict[str, Any] = {}
        for setting, value in row.items():
            if value is None:
                continue
            if isinstance(value, RowFault):
                return value
            try:
                given[setting] = self._read[setting](value)
            except ValueError as error:
                return self._fault(setting, value, str(error))
        made = replace(self._defaults, **given)
        if made.max_new_tokens >= self._context:
            why = f"leaves no room for a prompt in the model's {self._context}"
            return self._fault("max_new_tokens", made.max_new_tokens, why)
        return self._known.setdefault(made, made)

    def _adapter(self, name: Any) -> int:
        if name not in self._adapters:
            raise ValueError(f"model.adapters has {', '.join(self._adapters)}")
        return self._adapters[name]

    def _fault(self, setting: str, value: Any, why: str) -> RowFault:
        shown = repr(value) if len(repr(value)) <= 40 else f"{repr(value)[:37]}..."
        return RowFault(
            FaultCode.INVALID_SETTING, f"{setting} is {shown} in column {self._columns[setting]!r}: {why}"
        )


def _stop(value: Any) -> tuple[str, ...]:
    texts = (value,) if isinstance(value, str) else tuple(value)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("must be texts without a null")
    if "" in texts:
        raise ValueError("an empty stop text would end the answer at once")
    return texts


def _whole(value: Any) -> int:
    # What a tool that knows no nulls in integers writes: 64.0, and NaN for a null.
    if isinstance(value, float) and not value.is_integer():
        raise ValueError("must be a whole number")
    return int(value)


def _finite(value: Any) -> float:
    if not math.isfinite(value):
        raise ValueError("must be a finite number")
    return float(value)


def _bounded(read: Callable[[Any], Any], fits: Callable[[Any], bool], must: str) -> Callable[[Any], Any]:
    """Reads a number, which must fit."""

    def number(value: Any) -> Any:
        found = read(value)
        if not fits(found):
            raise ValueError(must)
        return found

    return number


_READ: dict[str, Callable[[Any], Any]] = {
    "max_new_tokens": _bounded(_whole, lambda n: n >= 1, "must be at least 1"),
    "temperature": _bounded(_finite, lambda n: n >= 0, "must be at least 0"),
    "top_p": _bounded(_finite, lambda n: 0 < n <= 1, "must be above 0 and at most 1"),
    "seed": _bounded(_whole, lambda n: -(1 << 63) <= n < 1 << 63, "must be a signed 64-bit number"),
    "stop": _stop,
}


def _check(setting: str, column: str, schema: pa.Schema) -> None:
    where = "model.adapter_column" if setting == "adapter" else f"generation.{setting}"
    if column not in schema.names:
        raise InputError(f"the input has no column {column!r}{nearest(column, schema.names)}", where)
    kind = schema.field(column).type
    if setting == "adapter":
        fits, wanted = holds_text(kind) or types.is_null(kind), "texts"
    elif setting == "stop":
        fits, wanted = holds_text(kind) or holds_texts(kind), "texts or lists of texts"
    else:
        fits, wanted = _holds_numbers(kind), "numbers"
    if not fits:
        raise InputError(f"column {column!r} is {kind}, and not {wanted}", where, "use input.cast")


def _holds_numbers(kind: pa.DataType) -> bool:
    if types.is_dictionary(kind):
        kind = kind.value_type
    return bool(types.is_integer(kind) or types.is_floating(kind) or types.is_null(kind))
