"""What users get wrong about their data, their prompt and their output: one line with what, where and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from mistakes import job_of, mistakes, refused

TEXT = {"text": ["good"]}
LOSSY = "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}{% endif %}{% endfor %}"


def parquet(path: Path, columns: Any = TEXT) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(columns if isinstance(columns, pa.Table) else pa.table(columns), path)
    return path


def file_of(name: str, data: bytes) -> Any:
    """Takes a file of these bytes for the input."""

    def make(folder: Path) -> dict[str, Any]:
        (folder / name).write_bytes(data)
        return {"input": {"path": name}}

    return make


def cut_short(folder: Path) -> dict[str, Any]:
    path = parquet(folder / "cut.parquet")
    path.write_bytes(path.read_bytes()[:-20])
    return {"input": {"path": path.name}}


def files_of(*tables: Any, **sections: Any) -> Any:
    """Takes a folder with a file for each table for the input."""

    def make(folder: Path) -> dict[str, Any]:
        for i, columns in enumerate(tables):
            parquet(folder / "lake" / f"{i}.parquet", columns)
        return {**sections, "input": {"path": "lake", **sections.get("input", {})}}

    return make


def tree_of(files: dict[str, Any], **sections: Any) -> Any:
    """Takes a folder with these files for the input."""

    def make(folder: Path) -> dict[str, Any]:
        for name, columns in files.items():
            parquet(folder / "lake" / name, columns)
        return {**sections, "input": {"path": "lake", **sections.get("input", {})}}

    return make


def folder_without_parquet(folder: Path) -> dict[str, Any]:
    (folder / "lake").mkdir()
    (folder / "lake" / "rows.csv").write_text("text\ngood\n")
    return {"input": {"path": "lake"}}


def of_input(**keys: Any) -> Any:
    return lambda folder: {"input": keys}


def of_output(**keys: Any) -> Any:
    return lambda folder: {"output": keys}


TWICE = pa.table([["a"], ["b"]], names=["text", "text"])

INPUTS = (
    ("a path that is not there", of_input(path="reviewz.parquet"), "reviewz.parquet", "give a Parquet file"),
    ("a folder that is not there", of_input(path="lake/2026"), "lake/2026", "give a Parquet file"),
    ("a glob that matches nothing", of_input(path="*.parq"), "*.parq", "glob"),
    (
        "one of two paths",
        of_input(path=["reviews.parquet", "more.parquet"]),
        "more.parquet",
        "give a Parquet",
    ),
    ("a csv file", file_of("rows.csv", b"text\ngood\n"), "rows.csv", "convert it with: python -c"),
    (
        "a zipped csv file",
        file_of("rows.csv.gz", b"\x1f\x8b\x08"),
        "rows.csv.gz",
        "convert it with: python -c",
    ),
    ("a jsonl file", file_of("rows.jsonl", b'{"text": "good"}\n'), "rows.jsonl", "pyarrow.json.read_json"),
    ("a folder of csv files", folder_without_parquet, "lake/rows.csv", "convert it with"),
    (
        "an HTML page",
        file_of("rows.parquet", b"<html><body>404</body></html>"),
        "rows.parquet",
        "give Parquet",
    ),
    ("an empty file", file_of("rows.parquet", b""), "rows.parquet", "give Parquet files"),
    ("a truncated file", cut_short, "cut.parquet", "give Parquet files"),
    ("a Git LFS pointer", file_of("rows.parquet", b"version https://git-lfs"), "rows.parquet", "Parquet"),
    (
        "one bad file of two",
        lambda folder: {
            "input": {"path": ["reviews.parquet", file_of("b.parquet", b"PAR1")(folder)["input"]["path"]]}
        },
        "b.parquet",
        "input.skip_bad_files",
    ),
    (
        "types that differ",
        files_of({"text": ["a"]}, {"text": [1]}),
        "'text' differs",
        "set input.cast: {text:",
    ),
    ("a needed column in some files", files_of(TEXT, {"body": ["a"]}), "'text' in", "add them"),
    ("a column twice", files_of(TWICE), "'text' in", "rename one of the two"),
    ("a misspelt column to carry", of_input(columns=["txt"]), "'txt'", "did you mean 'text'?"),
    ("a cast of a misspelt column", of_input(cast={"txt": "string"}), "'txt'", "did you mean 'text'?"),
    ("a cast to no type", of_input(cast={"id": "integer"}), "input.cast", "use pyarrow's names"),
    ("a cast that cannot be", of_input(cast={"tags": "int64"}), "input.cast", "string"),
    (
        "a key that is also a column",
        tree_of({"day=1/a.parquet": TEXT, "day=2/b.parquet": {**TEXT, "day": [2]}}),
        "'day' is a column of this file",
        "write it into all files, or into none",
    ),
    (
        "a folder's key of another type",
        tree_of({"day=1/a.parquet": TEXT, "day=x/b.parquet": TEXT}, input={"cast": {"day": "int64"}}),
        "day=x",
        "set input.cast: {day: string}",
    ),
    ("filters that are no list", of_input(filters="id > 1"), "input.filters", "a list"),
    ("a filter of words", of_input(filters=["id > 1"]), "input.filters", "[column, op, value]"),
    ("a filter without a value", of_input(filters=[["id", ">"]]), "input.filters", "[column, op, value]"),
    ("a filter by SQL", of_input(filters=[["text", "like", "g%"]]), "input.filters", "use one of ="),
    ("a filter on no column", of_input(filters=[["idd", ">", 1]]), "input", "did you mean 'id'?"),
    ("a filter of another type", of_input(filters=[["id", ">", "many"]]), "input.filters", "int64"),
    ("a filter in no list", of_input(filters=[["id", "in", 1]]), "input.filters", "needs a list"),
    ("a filter for null", of_input(filters=[["id", "=", None]]), "input.filters", "compare with a value"),
    ("a filter on a list", of_input(filters=[["tags", "=", "a"]]), "input.filters", "another column"),
    ("a directory below a file", of_input(path="reviews.parquet/x"), "reviews.parquet/x", "give a Parquet"),
)


def of_prompt(template: str | None = None, **keys: Any) -> dict[str, Any]:
    return {"prompt": {"template": template, **keys}}


PROMPTS = (
    ("an open block", of_prompt("{{ text"), "prompt.template: line 1", "fix the template"),
    ("an unknown tag", of_prompt("{% fro x in tags %}{% endfor %}{{ text }}"), "'fro'", "fix the template"),
    ("an open loop", of_prompt("{% for t in tags %}{{ t }}"), "prompt.template: line 1", "fix the template"),
    ("an unknown filter", of_prompt("{{ text | uppercase }}"), "'uppercase'", "fix the template"),
    ("an unknown column", of_prompt("{{ txt }}"), "'txt'", "did you mean 'text'?"),
    ("braces of an f-string", of_prompt("{text}: {{ id }}"), "{text}", "write {{ text }}"),
    ("only braces of an f-string", of_prompt("Summarise {text}"), "{text}", "write {{ text }}"),
    ("no column at all", of_prompt("Say hello."), "prompt", "use a column"),
    ("an empty template", of_prompt(""), "prompt", "use a column"),
    ("a call that fails", of_prompt("{{ text.nothing() }}"), "row 0", "check the template"),
    ("a text divided by a number", of_prompt("{{ text / 2 }}"), "row 0", "check the template"),
    ("a column that is not there", of_prompt(column="txt"), "'txt'", "did you mean 'text'?"),
    (
        "a column of numbers",
        of_prompt(column="id"),
        "prompt.column: column 'id' is int64",
        "use prompt.template",
    ),
    ("a column of lists", of_prompt(column="tags"), "prompt.column: column 'tags'", "use prompt.template"),
    (
        "an unknown role",
        of_prompt(
            messages=[{"role": "bot", "content": "Hi"}, {"role": "user", "content": "{{ text }}"}],
            chat_template=LOSSY,
        ),
        "'bot'",
        "use a role that it knows",
    ),
    (
        "a broken chat template",
        of_prompt(
            messages=[{"role": "user", "content": "{{ text }}"}], chat_template="{% for m in messages %}"
        ),
        "chat template: Unexpected end of template",
        "check the template",
    ),
    (
        "a broken message",
        of_prompt(messages=[{"role": "user", "content": "{{ text }"}]),
        "prompt.messages[0].content: line 1",
        "fix the template",
    ),
    (
        "more new tokens than the model has room for",
        {"generation": {"max_new_tokens": 9999}},
        "generation.max_new_tokens",
        "below 512",
    ),
)


def inside_input(folder: Path) -> dict[str, Any]:
    parquet(folder / "lake" / "a.parquet")
    return {"input": {"path": "lake"}, "output": {"path": "lake/answers"}}


def input_inside(folder: Path) -> dict[str, Any]:
    parquet(folder / "out" / "a.parquet")
    return {"input": {"path": "out/a.parquet"}}


def file_in_its_place(folder: Path) -> dict[str, Any]:
    (folder / "out").write_text("notes")
    return {}


def file_above(folder: Path) -> dict[str, Any]:
    (folder / "notes").write_text("notes")
    return {"output": {"path": "notes/out"}}


def foreign_files(folder: Path) -> dict[str, Any]:
    parquet(folder / "out" / "data" / "mine.parquet")
    return {}


def job_of_another_format(folder: Path) -> dict[str, Any]:
    (folder / "out" / "_job").mkdir(parents=True)
    (folder / "out" / "_job" / "job.json").write_text("{}")
    return {}


OUTPUTS = (
    (
        "filters that leave no row",
        of_input(filters=[["id", ">", 99]], allow_empty=False),
        "reviews.parquet",
        "check input.path and input.filters",
    ),
    ("an output inside the input", inside_input, "lake/answers", "neither inside the input nor around it"),
    ("an input inside the output", input_inside, "out", "neither inside the input nor around it"),
    ("a file in its place", file_in_its_place, "out", "remove it, or give another output.path"),
    ("a file above it", file_above, "notes/out", "give another output.path"),
    ("a folder that may not be written", of_output(path="/proc/answers"), "/proc/answers", "output.path"),
    ("a folder with other files", foreign_files, "mine.parquet", "give output.path an empty folder"),
    ("a damaged job.json", job_of_another_format, "_job/job.json", "output.path"),
    (
        "an input column named answer",
        files_of({**TEXT, "answer": ["a"]}),
        "'answer'",
        "set output.columns: {answer: answer_2}",
    ),
    ("an input column named STATUS", files_of({**TEXT, "STATUS": ["a"]}), "'STATUS'", "set output.columns"),
    ("two output columns of a name", of_output(columns={"error": "answer"}), "'answer'", "output.columns"),
    ("a name of the input", of_output(columns={"answer": "text"}), "'text'", "output.columns"),
    ("a row column of the input", of_output(row_column="id"), "output.row_column", "give another name"),
    ("partitions by a column", of_output(partition_by=["text"]), "output.partition_by", "leave it out"),
    (
        "partitions by an unknown key",
        tree_of({"day=1/a.parquet": TEXT}, output={"partition_by": ["dya"]}),
        "'dya'",
        "did you mean 'day'?",
    ),
    (
        "a column named like a place",
        files_of({**TEXT, "source_row": ["a"]}, output={"failed": "failed"}),
        "output.failed",
        "leave that column out",
    ),
)


@mistakes(*INPUTS)
def test_wrong_input_is_refused_in_one_line(mistake, tmp_path):
    job = job_of(tmp_path, **mistake.make(tmp_path))
    refused("run", job, where=mistake.where, fix=mistake.fix)


@mistakes(*PROMPTS)
def test_a_wrong_prompt_is_refused_in_one_line(mistake, tmp_path, tiny_llama):
    job = job_of(tmp_path, model={"name": str(tiny_llama)}, **mistake.make)
    refused("plan", job, where=mistake.where, fix=mistake.fix)


@mistakes(*OUTPUTS)
def test_a_wrong_output_is_refused_in_one_line(mistake, tmp_path, tiny_llama):
    job = job_of(tmp_path, model={"name": str(tiny_llama)}, **mistake.make(tmp_path))
    refused("run", job, where=mistake.where, fix=mistake.fix)
