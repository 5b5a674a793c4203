"""The section `output` of a job file: where the answers go, and how they are cut and staged."""

from __future__ import annotations

import re
from typing import Any, Literal

from pydantic import Field, PrivateAttr, field_validator

from batchrun.errors import nearest
from batchrun.job.answer import ASKED_COLUMNS
from batchrun.job.settings import Settings

OUTPUT_COLUMNS = ("answer", "finish_reason", "prompt_tokens", "output_tokens", "status", "error")
"""Columns that every output has."""

SAMPLE = "sample"
"""The column with a sample's number, where each is a row of its own."""

_NAMED = (*OUTPUT_COLUMNS, SAMPLE, *ASKED_COLUMNS)


class OutputSettings(Settings):
    """Where the answers go, how they are named, and when they are staged."""

    path: str = Field(
        min_length=1, description="a folder on any fsspec URL; batchrun owns data/ and _job/ in it"
    )
    columns: dict[str, str] = Field(default_factory=dict, description=f"other names for {', '.join(_NAMED)}")
    samples: Literal["list", "rows"] = Field(
        "list",
        description="what becomes of several generation.samples: columns of lists, a row of them for each of the "
        "input's; or rows of their own, each beside its input and with its number in the column sample",
    )
    failed: str | None = Field(
        None, description="a folder beside data/: the failed rows alone, each with its place in the input"
    )
    row_column: str | None = Field(
        None,
        min_length=1,
        description="a column with each row's input file and row in it, from 0, such as orders.parquet:123",
    )
    partition_by: list[str] = Field(
        default_factory=list,
        description="keys of the input's key=value folders: the parts are written into such folders of data/",
    )
    rows_per_part: int = Field(8192, ge=1, description="at most this many rows in a partition and its part")
    bytes_per_part: int = Field(256 << 20, ge=1, description="at most this many input bytes in a partition")
    compression: Literal["zstd", "snappy", "gzip", "lz4", "none"] = Field("zstd", description="of the parts")
    flush_rows: int = Field(2048, ge=1, description="finished rows are staged once there are this many")
    flush_bytes: int = Field(
        16 << 20, ge=1, description="finished rows are staged once they have this many bytes"
    )
    flush_seconds: float = Field(
        15.0, gt=0, description="finished rows are staged after this many seconds at the latest"
    )
    storage_options: dict[str, Any] = Field(
        default_factory=dict,
        repr=False,
        description="fsspec's options for the output; never written anywhere",
    )

    # How many answers a row of the input has, as the job's section `generation` says: see `Job`.
    _samples_of_input: int = PrivateAttr(1)

    @property
    def samples_of_row(self) -> int:
        """How many answers each row of the output has; with more than one, their columns are lists."""
        return self._samples_of_input if self.samples == "list" else 1

    @property
    def rows_of_row(self) -> int:
        """How many rows of the output each row of the input has."""
        return self._samples_of_input if self.samples == "rows" else 1

    def of_samples(self, samples: int) -> OutputSettings:
        """The same for rows of the input of so many answers."""
        copy = self.model_copy()
        copy._samples_of_input = samples
        return copy

    @field_validator("columns")
    @classmethod
    def _known_columns(cls, columns: dict[str, str]) -> dict[str, str]:
        for name in columns:
            if name not in _NAMED:
                raise ValueError(f"{name!r} is not an output column{nearest(name, _NAMED)}")
            if not columns[name]:
                raise ValueError(f"give {name} a name, or leave it out")
        return columns

    @field_validator("failed")
    @classmethod
    def _folder_of_its_own(cls, failed: str | None) -> str | None:
        if failed is not None and (failed in ("data", "_job") or not re.fullmatch(r"\w[\w.-]*", failed)):
            raise ValueError("give the name of a folder beside data/ and _job/, such as failed")
        return failed

    @property
    def answer_columns(self) -> list[str]:
        """OUTPUT_COLUMNS, SAMPLE and those of ASKED_COLUMNS that the job asks for: a job names these in `columns`."""
        return [*OUTPUT_COLUMNS, *(name for name in (SAMPLE, *ASKED_COLUMNS) if name in self.columns)]

    def column(self, name: str) -> str:
        """The name that the output column `name` (one of `answer_columns`) has in this job."""
        return self.columns.get(name, name)
