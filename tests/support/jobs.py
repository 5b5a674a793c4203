"""Whole jobs for tests: a dataset, a tiny model, a job file, and the command run as its user would."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import yaml
from warm import WarmCommand

from batchrun.job.job import Job

ROWS_OF_JOB = 60  # rows that write_job makes by default
SUPPORT = Path(__file__).parent
ECHO = "engines:EchoEngine"
# What names a run in the environment of its processes, engines that outlive it included.
RUN = "BATCHRUN_TEST_RUN"


def dataset(rows: int) -> pa.Table:
    """Rows of many types; `text` is unique, so that an answer shows which row it belongs to."""
    return _dataset(rows + 2).slice(0, rows)


def _dataset(rows: int) -> pa.Table:
    return pa.table(
        {
            "id": pa.array([None if i % 7 == 3 else i // 2 for i in range(rows)], pa.int64()),
            "text": [f"row {i} " + "x" * (i % 13) for i in range(rows)],
            "tags": pa.array([[str(i % 3)] * (i % 4) for i in range(rows)], pa.list_(pa.string())),
            "place": pa.array([{"x": i, "y": None} for i in range(rows)]),
            "kind": pa.array(["a", "b"] * (rows // 2) + ["a"] * (rows % 2)).dictionary_encode(),
            "at": pa.array([i * 1_000_000 for i in range(rows)], pa.timestamp("us", tz="Europe/Berlin")),
        }
    )


def write_job(
    folder: Path, model: Path, rows: int = ROWS_OF_JOB, row_group: int = 10, **sections: Any
) -> Path:
    """in.parquet and job.yaml in `folder`; `sections` are merged into the job's."""
    pq.write_table(dataset(rows), folder / "in.parquet", row_group_size=row_group)
    job: dict[str, Any] = {
        "input": {"path": "in.parquet"},
        "prompt": {"template": "{{ text }}"},
        "model": {"name": str(model)},
        "generation": {"max_new_tokens": 64},
        "engine": {"kind": ECHO},
        "output": {"path": "out", "rows_per_part": 20, "flush_rows": 4, "flush_seconds": 0.3},
    }
    for name, values in sections.items():
        job[name] = {**job.get(name, {}), **values}
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump(job))
    return path


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(SUPPORT), str(SUPPORT.parents[1]), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}


def start(*words: str, **env: str) -> WarmCommand:
    """`batchrun WORDS` in a session of its own, in a process that need not import anything, see `warm`."""
    return WarmCommand(words, environment(**env))


def start_driver(*words: str, **env: str) -> WarmCommand:
    """As `start`, but its workers and engines are programs below it, and are found by their words."""
    return WarmCommand(words, environment(**env), forks=False)


def start_program(*words: str, **env: str) -> subprocess.Popen[str]:
    """`batchrun WORDS` in a session of its own, as from a shell."""
    return subprocess.Popen(
        [sys.executable, "-m", "batchrun", *words],
        env=environment(**env),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def batchrun(*words: str, **env: str) -> tuple[int, str, str]:
    """Exit code, standard output, standard error."""
    process = start(*words, **env)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def engines_of(run: str) -> list[int]:
    """Processes of engines that were started with this value of RUN."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if "batchrun.engine.server" in process.cmdline() and process.environ().get(RUN) == run:
                found.append(process.pid)
    return found


def wait_until(
    condition: Callable[[], object], process: subprocess.Popen[str] | WarmCommand, seconds: float = 90.0
) -> None:
    """Until something is true while `process` runs; an error with what it said when it ends before."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


def answers(path: Path) -> pa.Table:
    """The whole output as any reader sees it, parts in order of their names."""
    files = sorted((path / "data").iterdir())
    return pa.concat_tables([pq.read_table(file) for file in files])


def check_complete(path: Path, rows: int, as_it_stands: bool = True) -> pa.Table:
    """The output holds each row once, in the input's order or in any, beside its own echo and its untouched input
    columns."""
    table = answers(path)
    if not as_it_stands:
        places = [place["x"] for place in table["place"].to_pylist()]
        table = table.take(sorted(range(len(places)), key=places.__getitem__))
    expected = dataset(rows)
    assert table.select(expected.column_names).equals(expected)
    assert table["answer"].to_pylist() == expected["text"].to_pylist()
    assert set(table["status"].to_pylist()) <= {"ok"}
    manifest = json.loads((path / "_job/manifest.json").read_text())
    assert (manifest["rows"], manifest["ok"], manifest["failed"]) == (rows, rows, 0)
    return table


def load(path: Path, *overrides: str) -> Job:
    return Job.load(path, overrides)
