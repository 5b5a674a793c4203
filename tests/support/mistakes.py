"""A user's mistakes: a small job without any, and the command line run on a wrong one in this process."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from typer.testing import CliRunner

from batchrun import cluster
from batchrun.cli import app

REVIEWS = {"text": ["good", "bad", "so so"], "id": [1, 2, 3], "tags": [["a"], [], ["b"]]}
# What no message may have: signs of a failure that nobody thought of, or words of a library for programmers.
UNTHOUGHT = re.compile(
    r"^unexpected|Traceback|pydantic|Input should|<class |object at 0x|Errno|\\n|; *$|\(\)"
)


class Mistake(NamedTuple):
    """What is wrong, where the message has to point, and what it has to advise."""

    id: str
    make: Any
    where: str
    fix: str


def mistakes(*table: tuple[str, Any, str, str]) -> pytest.MarkDecorator:
    """The parameter `mistake`, a test for each line of the table."""
    return pytest.mark.parametrize(
        "mistake", [Mistake(*line) for line in table], ids=[line[0] for line in table]
    )


def job_of(folder: Path, **sections: Any) -> Path:
    """reviews.parquet and a job.yaml without a mistake in `folder`, but for `sections`, which are merged into it."""
    pq.write_table(pa.table(REVIEWS), folder / "reviews.parquet")
    job: dict[str, Any] = {
        "input": {"path": "reviews.parquet"},
        "prompt": {"template": "Is this good? {{ text }}"},
        "model": {"name": "no-model/here/yet"},
        "generation": {"max_new_tokens": 8},
        "output": {"path": "out"},
    }
    for name, values in sections.items():
        both = isinstance(values, dict) and isinstance(job.get(name, {}), dict)
        job[name] = {**job.get(name, {}), **values} if both else values
    path = folder / "job.yaml"
    path.write_text(yaml.safe_dump({name: values for name, values in job.items() if values is not None}))
    return path


def refused(*words: str | Path, where: str, fix: str, exit_code: int = 2, writes: Path | None = None) -> str:
    """What the command says of a mistake: one line with what, where and the fix; nothing is written nor started.

    `writes` is the folder that stays as it was, by default that of the job file, its output and its input.
    """
    folder = writes or next((Path(word).parent for word in words if str(word).endswith(".yaml")), None)
    before = folder and contents(folder)
    with no_cluster():
        ran = CliRunner().invoke(app, [str(word) for word in words])
    lines = [line for line in ran.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, ran.output
    assert ran.exit_code == exit_code, lines[0]
    assert lines[0].startswith("error: ")
    assert ran.stdout == ""
    said = lines[0].removeprefix("error: ")
    assert not UNTHOUGHT.search(said), said
    assert where in said, said
    assert fix in said, said
    assert folder is None or contents(folder) == before
    return said


@contextmanager
def no_cluster() -> Iterator[None]:
    """Inside, no cluster starts on this machine, and to try it is an error."""
    started: list[object] = []

    def start(*settings: object) -> Any:
        started.append(settings)
        raise AssertionError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cluster, "local_cluster", start)
        yield
    assert not started, "a cluster was started"


def contents(folder: Path) -> dict[Path, int | None]:
    """Every file and folder below one, files with the time of their last change."""
    return {path: None if path.is_dir() else path.stat().st_mtime_ns for path in folder.rglob("*")}
