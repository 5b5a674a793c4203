"""What users get wrong on the command line: each is answered by one line with what, where and how to fix it."""

from __future__ import annotations

import json
from importlib import util
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mistakes import job_of, mistakes, refused
from typer.testing import CliRunner

import batchrun as library
from batchrun.cli import app
from jobs import load, write_job

# Words of a command after which JOB is the job file's path.
WORDS = (
    ("an unknown command", ["rnu", "JOB"], "'rnu'", "Did you mean 'run'?"),
    ("an unknown option", ["run", "JOB", "--forse"], "--forse", "--force"),
    ("no job file", ["run"], "job_file", "batchrun run --help"),
    ("two job files", ["run", "JOB", "more.yaml"], "more.yaml", "batchrun run --help"),
    ("a job file that is not there", ["run", "none.yaml"], "none.yaml", "give the path of a YAML file"),
    ("a directory", ["run", "FOLDER"], "Is a directory", "give the path of a YAML file"),
    ("a log format", ["run", "JOB", "--log-format", "xml"], "--log-format", "'json'"),
    (
        "an error rate in percent",
        ["run", "JOB", "--max-error-rate", "5"],
        "--max-error-rate",
        "equal to 1",
    ),
    (
        "an error rate in words",
        ["run", "JOB", "--max-error-rate", "low"],
        "--max-error-rate",
        "a valid number",
    ),
    ("an address that is none", ["run", "JOB", "--address", "head"], "cluster.address", "tcp://"),
    ("an option without its value", ["run", "JOB", "--set"], "--set", "requires an argument"),
    ("--set without a value", ["run", "JOB", "--set", "input.limit"], "--set", "key.path=value"),
    ("--set without a key", ["run", "JOB", "--set", "=3"], "--set", "key.path=value"),
    (
        "--set of an unknown key",
        ["run", "JOB", "--set", "input.limt=3"],
        "input.limt",
        "did you mean 'limit'?",
    ),
    ("--set of a wrong type", ["run", "JOB", "--set", "input.limit=all"], "input.limit", "a whole number"),
    ("--set of a section", ["run", "JOB", "--set", "input=3"], "input", "a mapping with the keys"),
    ("--set below a value", ["run", "JOB", "--set", "input.path.x=3"], "input.path", "give a path"),
    (
        "--set with dashes",
        ["run", "JOB", "--set", "input.skip-bad-files=true"],
        "skip-bad-files",
        "skip_bad_files",
    ),
    ("a trial without a unit", ["plan", "JOB", "--trial", "60"], "--trial", "write --trial 60s"),
    ("a trial in words", ["plan", "JOB", "--trial", "a minute"], "--trial", "write --trial 60s"),
    ("a trial of no time", ["plan", "JOB", "--trial", "0s"], "--trial", "write --trial 60s"),
    ("no GPUs", ["plan", "JOB", "--gpus", "0"], "--gpus", "greater than or equal to 1"),
    ("GPUs in words", ["plan", "JOB", "--gpus", "all"], "--gpus", "a valid integer"),
    (
        "an unknown error code",
        ["retry", "JOB", "--error", "TOO_LONG"],
        "--error",
        "did you mean 'PROMPT_TOO_LONG'?",
    ),
    ("an error code in small letters", ["retry", "JOB", "--error", "oom"], "--error", "OUT_OF_MEMORY"),
    ("a retry of nothing", ["retry", "JOB"], "out", "start one with `batchrun run`"),
    ("the status of nothing", ["status", "JOB"], "out", "start one with `batchrun run`"),
    ("a report of nothing", ["report", "JOB"], "out", "start one with `batchrun run`"),
    ("a verification of nothing", ["verify", "JOB"], "out", "start one with `batchrun run`"),
    ("cleaning nothing", ["clean", "JOB"], "out", "check output.path"),
    ("cleaning all of nothing", ["clean", "JOB", "--all"], "out", "check output.path"),
    (
        "an unknown workload",
        ["bench", "--workload", "sort"],
        "bench",
        "summarise, extract, write, chat, long",
    ),
    ("an unknown engine", ["bench", "--engine", "vllm"], "bench", "use padded, paged"),
    ("no rows", ["bench", "--rows", "0"], "--rows", "greater than or equal to 1"),
    ("a model beside a job", ["bench", "JOB", "--model", "tiny"], "--model", "--set model.name="),
    ("--set without a job", ["bench", "--set", "model.dtype=float16"], "--set", "add the job file"),
    ("an unknown shape", ["bench", "--model", "gpt5"], "gpt5", "give a local folder"),
    ("no dataset", ["init"], "dataset", "batchrun init --help"),
    (
        "a dataset that is not there",
        ["init", "FOLDER/none", "--out", "FOLDER/new.yaml"],
        "none",
        "give a Parquet",
    ),
    ("a csv file", ["init", "CSV", "--out", "FOLDER/new.yaml"], "rows.csv", "convert it with"),
    ("data without texts", ["init", "NUMBERS", "--out", "FOLDER/new.yaml"], "init", "prompt.template"),
    ("a job file that is there", ["init", "DATA", "--out", "JOB"], "job.yaml", "another name with --out"),
    ("a job file below a file", ["init", "DATA", "--out", "JOB/new.yaml"], "new.yaml", "give another --out"),
    ("a word for schema", ["schema", "job.yaml"], "job.yaml", "batchrun schema --help"),
)

# Of an output that is complete, some rows failed: what a command or a changed job gets wrong.
LATER = (
    (
        "a changed prompt",
        ["run", "--set", "prompt.template=What? {{ text }}"],
        "prompt.template",
        "output.path",
    ),
    ("other sampling", ["run", "--set", "generation.temperature=1"], "generation.temperature", "output.path"),
    ("a changed retry", ["retry", "--set", "prompt.template=What? {{ text }}"], "prompt.template", "--allow"),
    ("fewer rows", ["run", "--set", "input.limit=3"], "input.limit", "output.path"),
    ("a report below a file", ["report", "--out", "JOB/x.html"], "x.html", "give another file by --out"),
    ("a report into a folder", ["report", "--out", "FOLDER"], "Is a directory", "give another file by --out"),
    ("cleaning without a terminal", ["clean", "--all"], "clean --all", "add --yes"),
    (
        "cleaning another's output",
        ["clean", "--set", "prompt.template=x {{ text }}"],
        "prompt.template",
        "delete",
    ),
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, tiny_llama, cluster) -> Path:
    """A job whose output is complete."""
    job = write_job(tmp_path_factory.mktemp("finished"), tiny_llama, rows=20)
    library.run(load(job), client=cluster)
    return job


def filled_in(words: list[str], job: Path) -> list[str]:
    names = {"JOB": job, "FOLDER": job.parent, "DATA": job.parent / "reviews.parquet"}
    names |= {"CSV": job.parent / "rows.csv", "NUMBERS": job.parent / "numbers.parquet"}
    for name, path in names.items():
        words = [word.replace(name, str(path)) if word.split("/")[0] == name else word for word in words]
    return words


@mistakes(*WORDS)
def test_wrong_words_are_refused_in_one_line(mistake, tmp_path):
    job = job_of(tmp_path)
    (tmp_path / "rows.csv").write_text("text\ngood\n")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "numbers.parquet")
    refused(*filled_in(mistake.make, job), where=mistake.where, fix=mistake.fix, writes=tmp_path)


@mistakes(*LATER)
def test_a_mistake_about_a_complete_output_is_refused_in_one_line(mistake, finished):
    command, *words = filled_in(mistake.make, finished)
    refused(command, finished, *words, where=mistake.where, fix=mistake.fix)


@pytest.mark.parametrize(("url", "package"), [("s3://lake/x", "s3fs"), ("gs://lake/x", "gcsfs")])
def test_a_missing_package_is_refused_in_one_line(url, package, tmp_path, monkeypatch):
    known = util.find_spec
    monkeypatch.setattr(
        "batchrun.storage.protocols.find_spec", lambda name: None if name == package else known(name)
    )
    # An earlier test may have used the protocol, and then nobody looks for its package.
    monkeypatch.setattr("batchrun.storage.protocols.registry", {})
    refused("run", job_of(tmp_path, output={"path": url}), where=url, fix=f"pip install {package}")


def test_a_wrong_word_is_told_as_json_too(tmp_path):
    ran = CliRunner().invoke(app, ["status", str(tmp_path / "none.yaml"), "--json"])
    assert json.loads(ran.stdout)["exit_code"] == ran.exit_code == 2
