"""A look into an output's parts: how long prompts and answers are, and a few rows to read."""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchrun.counters import one_by_one
from batchrun.errors import RowFault
from batchrun.job.job import Job
from batchrun.prompt.renderer import RENDERER
from batchrun.prompt.template import message_columns, row_templates
from batchrun.storage import Folder

# Parts whose lengths are read; spread evenly.
SAMPLED_PARTS = 32
# Parts read at a time.
READERS = 8
# Of these, parts that rows to read are taken from.
READ_PARTS = 4
ROWS_PER_PART = 3
# Characters of a prompt or an answer that are kept.
TEXT = 2000
# Failed rows shown for each error code.
EXAMPLES = 3
# Error codes of which rows are shown.
CODES = 5


@dataclass(frozen=True, slots=True)
class ReadRow:
    """One row as a person reads it. `prompt` is (role, text) for each message; the role is empty for plain text."""

    key: str
    row: int
    prompt: list[tuple[str, str]]
    answer: str
    finish_reason: str
    error: str


@dataclass(frozen=True, slots=True)
class Look:
    """What the sampled parts hold: `parts` of them out of `of`; lengths in tokens, (answered rows,) each.

    `failures` are a few rows of each error code.
    """

    parts: int
    of: int
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    rows: list[ReadRow] = field(default_factory=list)
    failures: list[ReadRow] = field(default_factory=list)


def look(folder: Folder, job: Job, keys: Sequence[str], sizes: Sequence[int]) -> Look:
    """Reads a sample of the parts `keys` (`sizes` in bytes): lengths, errors, first rows and failed ones."""
    chosen = _spread(len(keys), SAMPLED_PARTS)
    column = job.output.column
    lengths = [column("prompt_tokens"), column("output_tokens")]
    failed: dict[str, list[tuple[int, int]]] = {}
    prompt_tokens, output_tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with ThreadPoolExecutor(READERS) as pool:
        files = list(pool.map(lambda i: _open(folder, keys[i], sizes[i]), chosen))
        tables = list(pool.map(lambda file: file.read([*lengths, column("error")]), files))
    for j, table in enumerate(tables):
        answered = table.filter(table[column("error")].is_null())
        prompt_tokens.append(answered[lengths[0]].to_numpy().astype(np.int64))
        output_tokens.append(one_by_one(answered[lengths[1]]).to_numpy().astype(np.int64))
        _collect_failed(failed, j, table[column("error")])
    reader = _RowReader(job)
    rows = [row for j in _spread(len(chosen), READ_PARTS) for row in reader.first(keys[chosen[j]], files[j])]
    places = [place for code in sorted(failed)[:CODES] for place in failed[code]]
    failures = [reader.one(keys[chosen[j]], files[j], row) for j, row in places]
    return Look(
        len(chosen), len(keys), np.concatenate(prompt_tokens), np.concatenate(output_tokens), rows, failures
    )


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), evenly apart, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _collect_failed(failed: dict[str, list[tuple[int, int]]], part: int, errors: pa.ChunkedArray) -> None:
    """Adds (part, row) of failed rows by code, a few of each."""
    for row in np.flatnonzero(errors.is_valid().to_numpy()).tolist():
        places = failed.setdefault(errors[row].as_py().partition(":")[0], [])
        if len(places) < EXAMPLES:
            places.append((part, row))


class _RowReader:
    """Rows of a part, each with its prompt as the job's templates make it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.templates = [template.source for template in row_templates(job.prompt)]
        self.wanted = message_columns(job.prompt)
        self.own = {name: job.output.column(name) for name in ("answer", "finish_reason", "error")}

    def first(self, key: str, file: pq.ParquetFile) -> list[ReadRow]:
        whole, columns = self._columns(file)
        for batch in file.iter_batches(ROWS_PER_PART, columns=[*columns, *self.own.values()]):
            return [self._row(key, i, batch.slice(i, 1), whole, columns) for i in range(batch.num_rows)]
        return []

    def one(self, key: str, file: pq.ParquetFile, row: int) -> ReadRow:
        whole, columns = self._columns(file)
        first = 0
        for group in range(file.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if row < first + rows:
                break
            first += rows
        table = file.read_row_group(group, [*columns, *self.own.values()]).slice(row - first, 1)
        return self._row(key, row, table.combine_chunks().to_batches()[0], whole, columns)

    def _columns(self, file: pq.ParquetFile) -> tuple[bool, list[str]]:
        """Whether the prompt's columns are all there, and the columns to show a row by."""
        there = file.schema_arrow.names
        # Where the prompt's columns were not carried, the row is shown by those that were.
        whole = all(name in there for name in self.wanted)
        answers = {self.job.output.column(name) for name in self.job.output.answer_columns}
        return whole, self.wanted if whole else [name for name in there if name not in answers]

    def _row(
        self, key: str, row: int, record: pa.RecordBatch, whole: bool, columns: Sequence[str]
    ) -> ReadRow:
        values = _values(record)
        prompt = self._prompt(values) if whole else _listed(values, columns)
        texts = {name: _cut(_text(values[column])) for name, column in self.own.items()}
        return ReadRow(key, row, prompt, **texts)

    def _prompt(self, values: dict[str, Any]) -> list[tuple[str, str]]:
        settings = self.job.prompt
        if settings.column is not None:
            value = values[settings.column]
            if isinstance(value, list):
                return [
                    (str(m.get("role", "")), _cut(str(m.get("content"))))
                    for m in value
                    if isinstance(m, dict)
                ]
            return [("", _cut(str(value)))]
        row = tuple(values[name] for name in self.wanted)
        roles = [message.role for message in settings.messages or [] for _ in message.texts] or [""]
        (made,) = RENDERER.rows(self.templates, self.wanted, [row])
        if isinstance(made, RowFault):
            return [("", f"({made})")]
        return [(role, _cut(text)) for role, text in zip(roles, made, strict=True)]


def _listed(values: dict[str, Any], columns: Sequence[str]) -> list[tuple[str, str]]:
    return [(name, _cut(str(values[name]))) for name in columns]


def _values(row: pa.RecordBatch) -> dict[str, Any]:
    values = {}
    for name in row.schema.names:
        try:
            values[name] = row[name][0].as_py()
        except UnicodeDecodeError:
            values[name] = "(not valid UTF-8)"
    return values


def _text(value: Any) -> str:
    return (
        json.dumps(value, ensure_ascii=False, default=str)
        if isinstance(value, dict | list)
        else str(value or "")
    )


def _cut(text: str) -> str:
    return text if len(text) <= TEXT else f"{text[:TEXT]}… ({len(text):,} characters)"


def _open(folder: Folder, key: str, size: int) -> pq.ParquetFile:
    return pq.ParquetFile(pa.PythonFile(_Ranged(folder, key, size), mode="r"), buffer_size=1 << 18)


class _Ranged(io.RawIOBase):
    """An object of the store as a file that is read in ranges: a column costs its own bytes, not the part's."""

    def __init__(self, folder: Folder, key: str, size: int) -> None:
        self.folder, self.key, self.size, self.at = folder, key, size, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self.at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self.at, io.SEEK_END: self.size}[whence]
        return self.at

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)
        end = min(self.size, self.at + len(view))
        data = self.folder.read(self.key, self.at, end) if end > self.at else b""
        view[: len(data)] = data
        self.at += len(data)
        return len(data)
