"""A look into an output's parts: how long prompts and answers are, and a few rows to read."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from batchrun.errors import RowFault
from batchrun.job.job import Job
from batchrun.job.settings import OUTPUT_COLUMNS
from batchrun.prompt.renderer import RENDERER
from batchrun.prompt.template import prompt_columns, row_templates
from batchrun.storage import Folder

SAMPLED_PARTS = 32  # parts whose lengths are read; spread evenly
READERS = 8  # parts read at a time
READ_PARTS = 4  # of these, parts that rows to read are taken from
ROWS_PER_PART = 3
TEXT = 2000  # characters of a prompt or an answer that are kept
EXAMPLES = 3  # failed rows shown for each error code


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

    `failures` maps an error code to a few lines "part, row: message".
    """

    parts: int
    of: int
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    rows: list[ReadRow] = field(default_factory=list)
    failures: dict[str, list[str]] = field(default_factory=dict)


def look(folder: Folder, job: Job, keys: Sequence[str], sizes: Sequence[int]) -> Look:
    """Reads a sample of the parts `keys` (`sizes` in bytes): the columns of lengths and errors, and first rows."""
    chosen = _spread(len(keys), SAMPLED_PARTS)
    column = job.output.column
    lengths = [column("prompt_tokens"), column("output_tokens")]
    failures: dict[str, list[str]] = {}
    prompt_tokens, output_tokens = [np.empty(0, np.int64)], [np.empty(0, np.int64)]
    with ThreadPoolExecutor(READERS) as pool:
        files = list(pool.map(lambda i: _open(folder, keys[i], sizes[i]), chosen))
        tables = list(pool.map(lambda file: file.read([*lengths, column("error")]), files))
    for i, table in zip(chosen, tables, strict=True):
        answered = table.filter(table[column("error")].is_null())
        prompt_tokens.append(answered[lengths[0]].to_numpy().astype(np.int64))
        output_tokens.append(answered[lengths[1]].to_numpy().astype(np.int64))
        _collect_failures(failures, keys[i], table[column("error")])
    reader = _RowReader(job)
    rows = [row for j in _spread(len(chosen), READ_PARTS) for row in reader.read(keys[chosen[j]], files[j])]
    return Look(
        len(chosen), len(keys), np.concatenate(prompt_tokens), np.concatenate(output_tokens), rows, failures
    )


def _spread(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), evenly apart, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, count - 1, min(count, most))}) if count else []


def _collect_failures(failures: dict[str, list[str]], key: str, errors: pa.ChunkedArray) -> None:
    for row in np.flatnonzero(errors.is_valid().to_numpy()).tolist():
        error = errors[row].as_py()
        lines = failures.setdefault(error.partition(":")[0], [])
        if len(lines) < EXAMPLES:
            lines.append(f"{key}, row {row}: {_cut(error)}")


class _RowReader:
    """The first rows of a part, each with its prompt as the job's templates make it."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.templates = [template.source for template in row_templates(job.prompt)]
        self.wanted = prompt_columns(job.prompt)

    def read(self, key: str, file: pq.ParquetFile) -> Iterator[ReadRow]:
        own = {name: self.job.output.column(name) for name in ("answer", "finish_reason", "error")}
        there = file.schema_arrow.names
        # Where the prompt's columns were not carried, the row is shown by those that were.
        whole = all(name in there for name in self.wanted)
        answers = {self.job.output.column(name) for name in OUTPUT_COLUMNS}
        columns = self.wanted if whole else [name for name in there if name not in answers]
        for batch in file.iter_batches(ROWS_PER_PART, columns=[*columns, *own.values()]):
            for i in range(batch.num_rows):
                values = _values(batch.slice(i, 1))
                prompt = self._prompt(values) if whole else _listed(values, columns)
                texts = {name: _cut(str(values[column] or "")) for name, column in own.items()}
                yield ReadRow(key, i, prompt, **texts)
            return

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
        roles = [message.role for message in settings.messages or []] or [""]
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
