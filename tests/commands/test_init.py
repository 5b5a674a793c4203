"""A job file from a dataset, and the keys that it may have: both follow the typed model."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml

from batchrun.commands.init import init
from batchrun.commands.plan import preview
from batchrun.errors import InputError, OutputError
from batchrun.job import schema
from batchrun.job.job import Job
from jobs import batchrun, dataset

REFERENCE = Path(__file__).parents[2] / "jobs" / "REFERENCE.md"


def write(folder: Path, **columns: object) -> str:
    pq.write_table(pa.table(columns), folder / "data.parquet")
    return str(folder / "data.parquet")


def test_the_file_that_init_writes_loads_and_plans(tmp_path, tiny_llama):
    pq.write_table(dataset(40), tmp_path / "in.parquet")
    path = tmp_path / "jobs" / "first.yaml"
    code, out, err = batchrun(
        "init", str(tmp_path / "in.parquet"), "--out", str(path), "--model", str(tiny_llama)
    )
    assert code == 0, err
    assert "batchrun plan" in out
    job = Job.load(path)
    assert job.input.path == str(tmp_path / "in.parquet")
    found = preview(job)
    assert (found["rows"], found["problems"]["errors"]) == (40, {})
    assert path.read_text().startswith("# yaml-language-server: $schema=job.schema.json\n")
    assert json.loads((path.parent / "job.schema.json").read_text()) == schema.json_schema()
    code, _, err = batchrun("init", str(tmp_path / "in.parquet"), "--out", str(path))
    assert (code, "is there already" in err) == (2, True)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"id": ["1", "2"], "text": ["a", "b"]}, "{{ text }}"),
        ({"key": ["1", "2"], "story": ["a long one", "and another"]}, "{{ story }}"),
        ({"n": [1], "the story": ["a"]}, "the story"),
        ({"chat": [[{"role": "user", "content": "hello"}]], "note": ["x"]}, "chat"),
        ({"text": ["a much longer text"], "prompt": ["b"]}, "{{ prompt }}"),
        ({"comment": ["x"], "messages": [[{"role": "user", "content": "hello"}]]}, "messages"),
    ],
)
def test_the_prompt_is_made_of_the_likeliest_column(tmp_path, columns, expected):
    path, _ = init(write(tmp_path, **columns), tmp_path / "job.yaml")
    prompt = Job.load(path).prompt
    assert expected == (prompt.column or prompt.messages[0].content)


def test_taken_names_and_texts_that_could_break_the_file_do_not(tmp_path):
    columns = {
        "text": ["x\n${HOME}: {{ y }} # \x00\u2028z"],
        "answer": ["a"],
        "answer_2": [1],
        "a: b\n- c": ["d"],
    }
    path, _ = init(write(tmp_path, **columns), tmp_path / "job.yaml")
    job = Job.load(path)
    assert job.output.columns == {"answer": "answer_3"}
    assert job.prompt.messages[0].content == "{{ text }}"


def test_a_dataset_without_texts_and_a_file_that_is_there_are_refused(tmp_path):
    data = write(tmp_path, n=[1, 2])
    with pytest.raises(InputError, match="no column holds texts"):
        init(data, tmp_path / "job.yaml")
    (tmp_path / "job.yaml").write_text("mine")
    with pytest.raises(OutputError, match="is there already"):
        init(data, tmp_path / "job.yaml")
    assert (tmp_path / "job.yaml").read_text() == "mine"


def test_the_committed_reference_is_the_generated_one():
    assert REFERENCE.read_text(encoding="utf-8") == schema.markdown(), f"run `{schema.COMMAND}`"


def test_every_key_says_what_it_means():
    assert [name for name, field, _ in schema.job_keys() if not field.description] == []


def test_the_schema_knows_the_keys_of_the_quickstart_job():
    job = yaml.safe_load((REFERENCE.parent / "quickstart" / "job.yaml").read_text())
    known = {name for name, _, _ in schema.job_keys()}
    assert {f"{section}.{key}" for section, keys in job.items() for key in keys} <= known
    described = schema.json_schema()
    assert set(described["required"]) == {"input", "prompt", "model", "output"}
    assert described["additionalProperties"] is False
