"""What a message points at: the input's rows, what differs, and what is safe."""

from __future__ import annotations

import re

import pyarrow.parquet as pq
import pytest
from tiny import write
from typer.testing import CliRunner

import batchrun as library
from batchrun.cli import app
from batchrun.commands.verify import verify
from batchrun.errors import ChangedError, OutputError
from batchrun.storage import Folder
from jobs import load, write_job

NAMES = "output.row_column=source"


def sources(folder) -> list[str]:
    parts = sorted((folder / "out" / "data").glob("*.parquet"))
    return [name for part in parts for name in pq.read_table(part)["source"].to_pylist()]


def test_rows_carry_the_file_and_the_row_that_they_come_from(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, rows=30)
    library.run(load(job, NAMES), client=cluster)
    assert sources(tmp_path) == [f"in.parquet:{row}" for row in range(30)]
    assert verify(load(job, NAMES)).found.passed


def test_filtered_rows_of_several_folders_keep_their_names(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama)
    for day in ("a", "b"):
        write(tmp_path / "lake" / day / "x.parquet", {"text": ["1", "2", "1", "3"]}, groups=2)
    changes = [NAMES, "input.path=lake", 'input.filters=[["text", "!=", "1"]]']
    library.run(load(job, *changes), client=cluster)
    assert sources(tmp_path) == ["a/x.parquet:1", "a/x.parquet:3", "b/x.parquet:1", "b/x.parquet:3"]
    assert verify(load(job, *changes)).found.passed


def test_a_failed_row_is_named_by_its_file_and_row(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, prompt={"template": "{{ id }}"})
    result = library.run(load(job, "limits.max_error_rate=1"), client=cluster)
    assert re.match(r"in\.parquet:3: NULL_PROMPT", result.examples["NULL_PROMPT"][0])


def test_the_column_of_names_is_part_of_the_jobs_identity(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, rows=5)
    library.run(load(job), client=cluster)
    with pytest.raises(ChangedError, match=r"output\.row_column: null -> source"):
        library.run(load(job, NAMES), client=cluster)
    with pytest.raises(OutputError, match="the name 'text' is a column of the input"):
        library.run(load(job, "output.row_column=text"), client=cluster)


def test_a_changed_setting_is_shown_where_it_differs(tmp_path, tiny_llama, cluster):
    long = "Summarise what follows in one sentence, and do not add anything that is not in it. "
    job = write_job(tmp_path, tiny_llama, rows=5, prompt={"template": long + "Text: {{ text }}"})
    library.run(load(job), client=cluster)
    with pytest.raises(ChangedError, match=r"prompt.template: \.\.\..*Text: .* -> \.\.\..*Document: "):
        library.run(load(job, f"prompt.template={long}Document: {{{{ text }}}}"), client=cluster)


def test_a_report_goes_into_a_folder_that_is_made_for_it(tmp_path, tiny_llama, cluster):
    job = write_job(tmp_path, tiny_llama, rows=5)
    library.run(load(job), client=cluster)
    page = tmp_path / "new" / "folder" / "report.html"
    assert CliRunner().invoke(app, ["report", str(job), "--out", str(page)]).exit_code == 0
    assert page.exists()
    refused = CliRunner().invoke(app, ["report", str(job), "--out", str(page / "below.html")])
    assert refused.exit_code == 2
    assert "give another file by --out" in refused.stderr


def test_urls_have_no_double_slash():
    assert Folder("s3://lake/out/").name == "s3://lake/out"
    assert Folder("s3://lake/out//").where("data/x") == "s3://lake/out/data/x"
    assert Folder("/").name == "/"


def test_flags_have_no_type_in_the_help():
    shown = CliRunner().invoke(app, ["run", "--help"], env={"COLUMNS": "120"}).stdout
    for flag in ("--json", "--force", "--debug"):
        line = next(line for line in shown.splitlines() if flag in line)
        assert "bool" not in line.lower()
