"""Input and output are kept apart, however their places are spelt: answers never become input."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
from tiny import write

from batchrun.driver.overlap import covers, refuse_files_in_output, refuse_overlap
from batchrun.driver.prepare import prepare
from batchrun.errors import OutputError
from batchrun.job.job import Job
from jobs import batchrun, write_job


@pytest.fixture
def lake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with lake/in.parquet, lake/day=1/in.parquet, and links: near -> lake, lake/far -> answers."""
    monkeypatch.chdir(tmp_path)
    for name in ("lake/in.parquet", "lake/day=1/in.parquet", "out/in.parquet"):
        write(tmp_path / name, {"text": ["a"]})
    (tmp_path / "near").symlink_to(tmp_path / "lake")
    (tmp_path / "apart").mkdir()
    (tmp_path / "apart/far").symlink_to(tmp_path / "answers")
    return tmp_path


def job_of(source: str | list[str], output: str, failed: str | None = None, **servers: Any) -> Job:
    return Job(
        input={"path": source, "storage_options": servers.get("read", {})},
        prompt={"template": "{{ text }}"},
        model={"name": "m"},
        output={"path": output, "failed": failed, "storage_options": servers.get("write", {})},
    )


def check(job: Job, files: Iterable[str]) -> None:
    """What a run does before and after it has listed its input."""
    refuse_overlap(job)
    refuse_files_in_output(job, files)


INSIDE = [
    ("lake", "lake/answers"),
    ("lake/", "./lake//answers/"),
    ("lake", "lake"),
    ("lake[1]", "lake[1]/answers"),
    ("lake", "other/../lake/answers"),
    (["elsewhere", "lake"], "lake/answers"),
    ("file://{here}/lake", "lake/answers"),
    ("lake", "file://{here}/lake/answers"),
    ("near", "lake/answers"),
    ("lake", "near/answers"),
    ("apart", "answers"),
    ("lake/*", "lake/answers"),
    ("lake/**", "lake/answers"),
    ("lake/**/*.parquet", "lake/answers"),
    ("l*", "lake/answers"),
    ("n*r", "lake/answers"),
    ("apart/*", "answers"),
    ("answers/data/*.parquet", "answers"),
    ("s3://lake/reviews", "s3://lake/reviews/answers/"),
    ("s3a://lake/reviews/", "s3://lake/reviews/../reviews/answers"),
    ("gs://lake/re*", "gcs://lake/reviews/answers"),
    ("abfs://lake@account.dfs.core.windows.net/in", "az://lake/in/answers"),
    ("simplecache::s3://lake/reviews", "s3://lake/reviews/answers"),
    ("memory://lake", "memory:///lake/answers"),
]
AROUND = [
    ("out/in.parquet", "out"),
    ("out/failed", "out"),
    ("lake/in.parquet", "."),
    ("o*/in.parquet", "out"),
    ("s3://lake/answers/data/part-00000-00000000.parquet", "s3://lake/answers"),
]
APART = [
    ("lake", "lakeside"),
    ("lake", "answers"),
    ("lake/in.parquet", "lake/answers"),
    ("lake/*.parquet", "lake/answers"),
    ("lake/day=*/", "lake/answers"),
    ("lake/*/*.parquet", "lake/answers"),
    ("lake/in.parquet", "out"),
    ("s3://lake/reviews", "gs://lake/reviews/answers"),
    ("s3://lake/reviews", "lake/reviews/answers"),
    ("s3://lake/reviews", "s3://lake/reviews-answers"),
]


@pytest.mark.parametrize(("source", "output"), INSIDE + AROUND)
def test_an_output_inside_the_input_or_around_it_is_refused(source: Any, output: str, lake: Path) -> None:
    source = [source] if isinstance(source, str) else source
    paths = [path.replace("{here}", str(lake)) for path in source]
    files = [str(path) for pattern in paths if "://" not in pattern for path in lake.glob(pattern)]
    with pytest.raises(OutputError, match="overlap"):
        check(job_of(paths, output.replace("{here}", str(lake))), files)


@pytest.mark.parametrize(("source", "output"), APART)
def test_an_output_beside_the_input_is_accepted(source: str, output: str, lake: Path) -> None:
    check(job_of(source, output), map(str, lake.glob("lake/**/*.parquet")))


def test_the_folder_of_failed_rows_is_no_input_either(lake: Path) -> None:
    with pytest.raises(OutputError, match="overlap"):
        refuse_overlap(job_of("*/fixed/*.parquet", "out", failed="fixed"))
    refuse_overlap(job_of("*/fixed/*.parquet", "out", failed="failed"))


def test_the_same_bucket_of_two_servers_is_two_places() -> None:
    one, two = ({"client_kwargs": {"endpoint_url": f"http://{host}:9000"}} for host in "ab")
    refuse_overlap(job_of("s3://lake/in", "s3://lake/in/out", read=one, write=two))
    with pytest.raises(OutputError, match="overlap"):
        refuse_overlap(job_of("s3://lake/in", "s3://lake/in/out", read=one, write=one))


def test_a_run_into_its_own_input_is_refused_before_anything_is_written(
    tiny_llama: Path, tmp_path: Path
) -> None:
    path = write_job(
        tmp_path, tiny_llama, input={"path": "lake", "since": "last"}, output={"path": "lake/out"}
    )
    (tmp_path / "lake").mkdir()
    shutil.move(tmp_path / "in.parquet", tmp_path / "lake/in.parquet")
    code, _, err = batchrun("run", str(path))
    assert (code, err.count("\n")) == (2, 1)
    assert "input and output overlap" in err
    assert not (tmp_path / "lake/out").exists()
    with pytest.raises(OutputError, match="overlap"):
        prepare(Job.load(path))


def test_an_input_path_covers_the_files_that_it_lists() -> None:
    assert covers("/lake", "/lake/day=1/a.parquet", {})
    assert covers("/lake/*/", "/lake/day=1/a.parquet", {})
    assert covers("s3://b/lake/", "s3://b/lake/a.parquet", {})
    assert not covers("/lake/day=2", "/lake/day=1/a.parquet", {})
    assert not covers("/lake", "s3://b/lake/a.parquet", {})
