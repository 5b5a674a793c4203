"""A job with an engine of `faulty_engines`, run on a cluster that tests share, and what its processes noted."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow as pa
from distributed import Client

import batchrun as library
from batchrun.commands.verify import verify
from batchrun.report.result import RunResult
from jobs import answers, dataset, load, write_job

ROWS, PART = 16, 8


class Setting:
    """A job of two partitions with an engine of `faulty_engines`, and what its processes noted."""

    def __init__(self, folder: Path, model: Path, cluster: Client, engine: str, **sections: Any) -> None:
        self.folder, self.cluster, self.name = folder, cluster, f"{engine}-{time.time_ns()}"
        self.rows = sections.get("rows", ROWS)
        shutil.copytree(model, folder / self.name)
        output = {"rows_per_part": PART, **sections.pop("output", {})}
        self.job = write_job(
            folder, folder / self.name, **{"rows": ROWS, "row_group": PART, "output": output, **sections},
            engine={"kind": f"faulty_engines:{engine}"},
        )  # fmt: skip

    def run(self, *overrides: str) -> RunResult:
        return library.run(load(self.job, *overrides), client=self.cluster)

    @property
    def processes(self) -> list[list[str]]:
        """What each engine process noted, in the order of their starts."""
        place = Path(tempfile.gettempdir()) / f"batchrun-notes-{self.name}"
        return [file.read_text().splitlines() for file in sorted(place.glob("*"))]

    def forget(self) -> None:
        """Deletes what the processes noted."""
        shutil.rmtree(Path(tempfile.gettempdir()) / f"batchrun-notes-{self.name}", ignore_errors=True)

    def check(self, errors: dict[int, str]) -> pa.Table:
        """Every row once and in order, answered or with this code; and `verify` agrees."""
        table = answers(self.folder / "out")
        expected = dataset(self.rows)
        assert table.select(expected.column_names).equals(expected)
        codes = {i: e.split(":")[0] for i, e in enumerate(table["error"].to_pylist()) if e}
        assert codes == errors
        texts = [None if i in errors else text for i, text in enumerate(expected["text"].to_pylist())]
        assert table["answer"].to_pylist() == texts
        assert verify(load(self.job)).found.passed
        return table
