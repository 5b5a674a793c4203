"""What a finished run is: counts to act on, and the way to the answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from batchrun.counters import Counters
from batchrun.dataset.hive import keys_of, scalar_of
from batchrun.engine.protocol import EngineStats
from batchrun.errors import ExitCode
from batchrun.storage import Folder
from batchrun.telemetry.printable import counted


@dataclass(frozen=True, repr=False)
class RunResult:
    """A complete output: what all its rows came to, whichever run generated them, and what this run did for it.

    `rows`, `ok` and `failed` are the output's, of which each of the `input_rows` may have several, one for each sample;
    `counts` are of the input's. `errors` counts failed rows by code, and `examples` shows a few of each;
    `finish_reasons` counts all rows ("length" was cut at `max_new_tokens`), `empty` those with an answer of no text.
    This run's own are `counts`, `seconds` of wall time, `milestones` that tell when it came how far (see `Milestones`),
    `engines`, one set of counters per engine process that it used, `gpus_per_engine`, and `gpu_seconds`, the time of
    all of their GPUs.
    """

    output: str
    rows: int
    ok: int
    failed: int
    parts: int
    prompt_tokens: int
    output_tokens: int
    errors: dict[str, int]
    examples: dict[str, list[str]]
    seconds: float
    finish_reasons: dict[str, int] = field(default_factory=dict)
    empty: int = 0
    counts: Counters = field(default_factory=Counters)
    milestones: dict[str, float] = field(default_factory=dict)
    engines: list[EngineStats] = field(default_factory=list)
    part_keys: list[str] = field(default_factory=list)
    storage_options: dict[str, Any] = field(default_factory=dict)
    input_rows: int = 0
    gpus_per_engine: int = 1
    gpu_seconds: float = 0.0

    def __repr__(self) -> str:
        """One line: a notebook shows it of every cell that ends with a run."""
        failed = f", {self.failed:,} failed" if self.failed else ""
        rows = f"{self.ok:,} of {self.rows:,} rows answered{failed} in {counted(self.parts, 'part')}"
        return f"<RunResult: {rows}, {self.seconds:.1f} s: {self.output}/data>"

    @property
    def requests(self) -> int:
        """Rows that this run sent to its engines; 0 when nothing was left to do."""
        return self.counts.requests

    @property
    def reused(self) -> int:
        """Rows that earlier attempts had staged for this run."""
        return self.counts.reused

    @property
    def tokens_per_gpu_second(self) -> float | None:
        """Prompt and output tokens that this run generated, by the time of its GPUs; None before there was any."""
        return self.counts.tokens / self.gpu_seconds if self.gpu_seconds else None

    @property
    def exit_code(self) -> ExitCode:
        """The command's: 3 where rows failed, else 0."""
        return ExitCode.FAILED_ROWS if self.failed else ExitCode.COMPLETE

    @property
    def folder(self) -> Folder:
        """The output's folder."""
        return Folder(self.output, self.storage_options)

    def to_json(self) -> dict[str, Any]:
        """Plain values for a pipeline; no storage options."""
        values = asdict(self)
        del values["storage_options"], values["part_keys"]
        state = {"status": "complete", "exit_code": int(self.exit_code)}
        return {**state, **values, "requests": self.requests, "reused": self.reused} | {
            "tokens_per_gpu_second": self.tokens_per_gpu_second
        }

    def to_dask(self) -> Any:
        """The output as a `dask.dataframe.DataFrame`, one partition per part, in the plan's order.

        Columns keep their Arrow types (`pandas.ArrowDtype`): int64 with nulls, lists and structs stay what they are.
        """
        import dask.dataframe as dd

        folder = self.folder
        meta = _to_pandas(read_part(folder, self.part_keys[0]).schema.empty_table())
        return dd.from_map(_load_part, self.part_keys, folder=folder, meta=meta)

    def sample(self, rows: int) -> pa.Table:
        """The first rows of the first part."""
        return read_part(self.folder, self.part_keys[0]).slice(0, rows)


def read_part(folder: Folder, key: str) -> pa.Table:
    """A part with the columns that stand in its folders, as texts."""
    table = pq.read_table(pa.BufferReader(folder.read(key)))
    for name, value in keys_of(key):
        scalar = scalar_of(value, pa.string())
        table = table.append_column(name, pa.repeat(scalar, table.num_rows))
    return table


def _load_part(key: str, folder: Folder) -> Any:
    return _to_pandas(read_part(folder, key))


def _to_pandas(table: pa.Table) -> Any:
    import pandas as pd

    return table.to_pandas(types_mapper=pd.ArrowDtype)
