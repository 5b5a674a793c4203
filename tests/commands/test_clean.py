"""`clean` deletes what this job's runs wrote and nothing else, with nobody at work and a person's consent."""

from __future__ import annotations

import os
import pty
import shutil
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import pytest
import yaml
from parts import other_holder

import batchrun as library
from batchrun.commands.clean import clean
from batchrun.commands.verify import verify
from batchrun.driver.run import Dispatch
from batchrun.errors import ChangedError, Interrupted, LeaseHeld, OutputError
from batchrun.output import document, lease
from batchrun.output.layout import LEASE
from batchrun.storage import Folder
from jobs import batchrun, environment, load, write_job

MINE = {"limits": {"max_error_rate": 1}, "cluster": {"price_per_gpu_hour": 3600}}


@pytest.fixture(scope="module")
def finished(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory, cluster) -> Path:
    """A folder with a job and its complete output."""
    folder = tmp_path_factory.mktemp("finished")
    library.run(load(write_job(folder, tiny_llama, **MINE)), client=cluster)
    return folder


@pytest.fixture
def here(finished: Path, tmp_path: Path) -> Path:
    """The output beside a job file of its own, made anew for each test: its input stays where it was."""
    job = yaml.safe_load((finished / "job.yaml").read_text())
    job["input"]["path"] = str(finished / "in.parquet")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    shutil.copytree(finished / "out", tmp_path / "out")
    return tmp_path


def everything_under(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def foreign_to(folder: Path) -> dict[str, bytes]:
    """Files that others put into an output, some under names much like batchrun's; returns what they hold."""
    names = (
        "data/part-00000-01234567.parquet", "data/part-00099-{hash}.parquet", "data/part-mine.parquet", "notes.txt",
        "_job/notes.txt", "_job/runs/mine.json", "_job/stage/mine/1-a-1.chunk", "failed/part-mine.parquet",
    )  # fmt: skip
    plan = next((folder / "data").iterdir()).stem.rpartition("-")[2]
    for name in names:
        path = folder / name.format(hash=plan)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"theirs")
    return {name.format(hash=plan): b"theirs" for name in names}


def test_cleaning_all_deletes_every_file_of_this_job_and_none_of_others(here: Path) -> None:
    theirs = foreign_to(here / "out")
    clean(load(here / "job.yaml"), everything=True)
    assert everything_under(here / "out") == theirs


@pytest.mark.parametrize("everything", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        "prompt.template=x{{ text }}",
        "model.name=org/another",
        "input.path=elsewhere.parquet",
        "generation.seed=4",
    ],
)
def test_the_output_of_another_job_is_never_cleaned(here: Path, change: str, everything: bool) -> None:
    before = everything_under(here / "out")
    with pytest.raises(ChangedError, match="nothing deleted: it holds answers of another job"):
        clean(load(here / "job.yaml", change), everything)
    assert everything_under(here / "out") == before


def test_places_and_budgets_do_not_make_it_another_job(here: Path) -> None:
    clean(load(here / "job.yaml", "engine.window_rows=7", "cluster.slots=1", "output.flush_rows=9"), True)
    assert not everything_under(here / "out")


def test_a_folder_that_was_never_an_output_is_left_alone(here: Path) -> None:
    (here / "out/_job/job.json").unlink()
    before = everything_under(here / "out")
    for everything in (True, False):
        with pytest.raises(OutputError, match="no run was ever started here"):
            clean(load(here / "job.yaml"), everything)
    assert everything_under(here / "out") == before


def test_nothing_is_cleaned_while_a_driver_is_at_work(here: Path) -> None:
    folder = Folder(str(here / "out"))
    holder = other_holder(heartbeat=time.time())
    folder.put(LEASE, document.encode(asdict(holder)))
    before = everything_under(here / "out")
    for everything in (True, False):
        with pytest.raises(LeaseHeld):
            clean(load(here / "job.yaml"), everything)
    assert everything_under(here / "out") == before


def test_no_driver_starts_while_it_cleans(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from batchrun.output import clean as cleaning

    held = []
    monkeypatch.setattr(cleaning, "delete", lambda folder, keys: held.append(lease.read(folder)))
    clean(load(here / "job.yaml"), everything=True)
    assert held[0] is not None
    assert held[0].pid == os.getpid()
    assert lease.read(Folder(str(here / "out"))) is None


@pytest.mark.parametrize("everything", [True, False])
def test_cleaning_never_follows_a_symbolic_link(here: Path, everything: bool) -> None:
    outside = here / "outside"
    chunk = next((here / "out/data").iterdir()).stem.removeprefix("part-")
    for name in (f"{chunk}/0-a-1.chunk", "tmp/old", "part-mine.parquet"):
        (outside / name).parent.mkdir(parents=True, exist_ok=True)
        (outside / name).write_bytes(b"theirs")
        os.utime(outside / name, (0, 0))
    before = everything_under(outside)
    (here / "out/_job/stage").symlink_to(outside)
    shutil.rmtree(here / "out/_job/tmp", ignore_errors=True)
    (here / "out/_job/tmp").symlink_to(outside / "tmp")
    (here / "out/failed").symlink_to(outside)
    part = next((here / "out/data").iterdir())
    shutil.move(part, outside / "moved.parquet")
    part.symlink_to(outside / "moved.parquet")
    clean(load(here / "job.yaml", "output.failed=failed"), everything)
    assert {name: (outside / name).read_bytes() for name in before} == before
    assert (outside / "moved.parquet").exists()


def test_an_output_whose_job_folder_is_a_link_is_not_cleaned(here: Path) -> None:
    shutil.move(here / "out/_job", here / "outside")
    (here / "out/_job").symlink_to(here / "outside")
    before = everything_under(here / "outside")
    with pytest.raises(OutputError, match="no run was ever started here"):
        clean(load(here / "job.yaml"), everything=True)
    assert everything_under(here / "outside") == before
    assert list((here / "out/data").iterdir())


def test_without_a_terminal_cleaning_all_is_refused_unless_it_is_said_twice(here: Path) -> None:
    before = everything_under(here / "out")
    code, _, err = batchrun("clean", str(here / "job.yaml"), "--all")
    assert (code, err.count("\n")) == (2, 1)
    assert "60 answered rows in 3 parts" in err
    assert "which cost " in err
    assert "--yes" in err
    assert everything_under(here / "out") == before
    code, out, _ = batchrun("clean", str(here / "job.yaml"), "--all", "--yes")
    assert (code, "objects deleted" in out) == (0, True)
    assert not everything_under(here / "out")


def test_one_part_is_called_one_part(here: Path) -> None:
    for part in sorted((here / "out/data").iterdir())[1:]:
        part.unlink()
    told: list[str] = []
    clean(load(here / "job.yaml"), everything=True, confirm=told.append)
    assert "answered rows in 1 part of" in told[0]


@pytest.mark.parametrize(("answer", "code"), [("n", 2), ("y", 0)])
def test_on_a_terminal_cleaning_all_asks_and_shows_rows_and_cost(here: Path, answer: str, code: int) -> None:
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "batchrun", "clean", str(here / "job.yaml"), "--all"],
        stdin=follower, stdout=follower, stderr=follower, env=environment(), close_fds=True,
    )  # fmt: skip
    os.close(follower)
    shown = b""
    while b"Delete them?" not in shown:
        shown += os.read(leader, 4096)
    assert b"60 answered rows in 3 parts" in shown
    assert b"which cost " in shown
    os.write(leader, f"{answer}\n".encode())
    assert process.wait(60) == code
    assert bool(everything_under(here / "out")) == (answer == "n")
    os.close(leader)


def test_a_stopped_run_keeps_what_is_staged_and_goes_on_after_cleaning(
    here: Path, tiny_llama: Path, cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = load(write_job(here, tiny_llama, output={"path": "begun"}))

    def stopped(self: Dispatch, client: object) -> None:
        raise Interrupted("stopped")

    with monkeypatch.context() as patch:
        patch.setattr(Dispatch, "execute", stopped)
        with pytest.raises(Interrupted):
            library.run(job, client=cluster)
    clean(job)
    assert library.run(job, client=cluster).ok == 60
    assert verify(job).found.passed
